# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests that a subclass of a vLLM class reuses a name of its base only if it means to override it."""

import ast
import functools
import gc
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from types import ModuleType

import pytest
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

import vllm_vtw
from vllm_vtw.families import BY_ARCHITECTURE, DECODERS
from vllm_vtw.kv.scheduler import VTWScheduler
from vllm_vtw.models.decoder import staged_text_model
from vllm_vtw.models.processor import marking_processor
from vllm_vtw.models.served import served_model
from vllm_vtw.worker.attention_backend import stage_backend
from vllm_vtw.worker.ranking import ranking_impl

BACKENDS = (CPUAttentionBackend, FlashAttentionBackend, TritonAttentionBackend)

OVERRIDES = {
    "GatedWorker": {"execute_model", "sample_tokens"},
    "MarkingProcessor": {"apply"},
    "OrderingWorker": {"execute_model", "load_model", "sample_tokens"},
    "PipelineWorker": {"execute_model"},
    "RankingImpl": {"forward"},
    "StageAttention": {"bind_kv_cache", "get_attn_backend", "get_kv_cache_spec"},
    "StageBuilder": {"build", "get_cudagraph_support", "supports_update_block_table"},
    "StagedNixlConnector": {"request_finished_all_groups"},
    "StagedNixlWorker": {"compat_hash"},
    "StagedOffloadScheduler": {
        "_select_eager_blocks_to_store",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
    },
    "StageManager": {
        "add_local_computed_blocks",
        "allocate_external_computed_blocks",
        "allocate_new_blocks",
        "block_size",
        "cache_blocks",
        "find_longest_cache_hit",
        "get_num_blocks_to_allocate",
        "pop_blocks_for_free",
    },
    "StageSpec": {"is_uniform_with_collection", "max_memory_usage_bytes", "uses_slot_mapping"},
    "StagedTextModel": {"forward"},
    "StagedKVCacheManager": {"estimate_cached_tokens", "take_kv_cache_block_copies", "usage"},
    "VTWModelConfig": {"verify_and_update_config"},
    "VTWModelState": {"add_request", "initialize_kv_cache", "prepare_attn", "remove_request"},
    "GuardedScheduler": {
        "_try_schedule_encoder_inputs",
        "finish_requests",
        "get_num_unfinished_requests",
        "get_request_counts",
        "reset_prefix_cache",
        "running",
        "schedule",
        "set_pause_state",
        "update_from_output",
    },
    "VTWScheduler": {
        "_free_blocks",
        "_handle_blocked_waiting_request",
        "_try_schedule_encoder_inputs",
        "add_request",
        "make_stats",
        "schedule",
        "update_from_output",
    },
    "EncoderLookahead": {"reset_encoder_cache"},
    "AnnotatedOutput": {"get_output"},
    "WithdrawalMetrics": {"log_engine_initialized", "record"},
    **{f"VTW{architecture}": {"_processor_factory"} for architecture in BY_ARCHITECTURE},
}
"""What each class means to override. If a test finds another name that a base has too, rename it, or add it
here if the base's callers are meant to use the new one."""
SINCE_0_33 = {"AnnotatedOutput": {"get_kv_connector_output"}}
"""What else it means to override where the base has it."""


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(vllm_vtw.__path__, "vllm_vtw."):
        yield importlib.import_module(info.name)


def text_model(name: str) -> type:
    module, _, cls = name.rpartition(".")
    found: type = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), cls)
    return found


def subclasses() -> dict[str, type]:
    """All classes of the plugin that subclass one of vLLM's, including those made at run time."""
    made = [stage_backend(backend).get_builder_cls() for backend in BACKENDS]
    made += [ranking_impl(backend.get_impl_cls()) for backend in BACKENDS]
    made.append(marking_processor(LlavaMultiModalProcessor))
    made += [served_model(architecture) for architecture in BY_ARCHITECTURE]
    made += [staged_text_model(text_model(name)) for name in set(DECODERS.values())]
    for module in modules():
        made += [
            cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__
        ]
    return {
        f"{cls.__name__} of {cls.__bases__[0].__name__}": cls
        for cls in made
        if any(base.__module__.startswith("vllm.") for base in cls.__mro__)
    }


@functools.cache
def names(cls: type) -> set[str]:
    """The names that a class itself defines, annotates or assigns to `self`."""
    found = {name for name in vars(cls) if not (name.startswith("__") and name.endswith("__"))}
    found |= set(inspect.get_annotations(cls))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C, or made by a decorator
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                found.add(node.attr)
    return found - {"_abc_impl", "_is_protocol"}


def reused(cls: type) -> set[str]:
    """The names that are in the plugin's classes among a class's bases, and in other bases too."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("vllm_vtw.")]
    others = [base for base in cls.__mro__ if base not in ours and base is not object]
    return set[str]().union(*map(names, ours)) & set[str]().union(*map(names, others))


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Python 3.11 may end `ast.parse` with a SystemError if garbage is collected meanwhile."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("name", "cls"), sorted(subclasses().items()), ids=str)
def test_a_subclass_reuses_no_name_without_meaning_to(name: str, cls: type):
    meant = [table.get(base.__name__, set()) for base in cls.__mro__ for table in (OVERRIDES, SINCE_0_33)]
    assert reused(cls) <= set[str]().union(*meant)


def test_every_override_is_one():
    """If the base no longer has a name, nobody calls the override."""
    found: dict[str, set[str]] = {}
    for cls in subclasses().values():
        here = reused(cls)
        for base in cls.__mro__:
            found.setdefault(base.__name__, set()).update(here)
    gone = {name: meant - found.get(name, set()) for name, meant in OVERRIDES.items()}
    assert not any(gone.values()), gone


def test_what_the_base_assigns_to_itself_is_found():
    """`Scheduler.policy` is the scheduling policy. The plugin once kept its own under that name."""
    wrong = type("Wrong", (VTWScheduler,), {"policy": None, "__module__": "vllm_vtw.made_up"})
    assert reused(wrong) - reused(VTWScheduler) == {"policy"}
    assert {"withdrawal_policy", "running"} <= names(VTWScheduler)
