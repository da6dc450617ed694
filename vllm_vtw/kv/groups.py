# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's split of layers into KV-cache groups, by which a spec can choose their size.

Since 0.33, vLLM asks the model class for the groups. Before, one of its functions is hooked.
"""

import functools
import inspect
from collections import defaultdict
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models import interfaces
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

from vllm_vtw.versions import unknown

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # before 0.33
    from vllm.v1.core import kv_cache_utils as planning

TARGET = "_get_kv_cache_groups_uniform_page_size"
EXTENSION_POINT = "layers_per_group"
"""The method of a KV-cache spec that returns the number of layers in a group, for each spec of a model."""
ASKS_MODELS = "SupportsKVCacheGrouping"
"""What vLLM has if it calls `get_kv_cache_groups` of a model class."""


def groups_of(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """The KV-cache groups of a model, in a vLLM that asks its class for them.

    Args:
        vllm_config: vLLM's configuration.
        specs: By layer name, the layer's spec. They may be those of one pipeline rank.
    """
    groups: list[KVCacheGroupSpec] | None = _chosen_groups(specs)
    return planning.get_kv_cache_groups(vllm_config, specs) if groups is None else groups


def install() -> None:
    """Wraps vLLM's function that splits layers into groups, so that it calls the specs' `layers_per_group`.

    Does nothing if vLLM calls it by itself (`patches/kv-cache-groups.diff`), or asks the model class.

    Raises:
        RuntimeError: The function is not the one that the wrapper was written for.
    """
    if hasattr(KVCacheSpec, EXTENSION_POINT) or hasattr(interfaces, ASKS_MODELS):
        return
    original = getattr(planning, TARGET, None)
    if getattr(original, "asks_specs", False):
        return
    if original is None or list(inspect.signature(original).parameters) != ["kv_cache_spec"]:
        raise unknown(f"{planning.__name__}.{TARGET}")

    @functools.wraps(original)
    def split(kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
        groups = _chosen_groups(kv_cache_spec)
        return original(kv_cache_spec) if groups is None else groups

    split.asks_specs = True  # type: ignore[attr-defined]
    setattr(planning, TARGET, split)


def _chosen_groups(specs: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec] | None:
    """The groups that one of the specs has chosen for all of them. None if none of them chooses."""
    chosen: Any = [getattr(spec, EXTENSION_POINT, None) for spec in specs.values()]
    choose = next(filter(None, chosen), None)
    if choose is None:
        return None
    layers: dict[KVCacheSpec, list[str]] = defaultdict(list)
    for name, spec in specs.items():
        layers[spec].append(name)
    groups = []
    for names, size in zip(layers.values(), choose(list(layers)), strict=True):
        count = -(-len(names) // size)
        groups += [names[group::count] for group in range(count)]
    made: list[KVCacheGroupSpec] = planning.create_kv_cache_group_specs(specs, groups)
    return made
