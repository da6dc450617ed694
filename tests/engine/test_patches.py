# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Each diff applies to the installed vLLM and makes the plugin's hook unnecessary."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
DIFFS = sorted(PATCHES.glob("*.diff"))

HOOKS = """
from vllm.model_executor.models import ModelRegistry
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from types import SimpleNamespace
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm_vtw.config import Admission
from vllm_vtw.policy import Policy
from vllm_vtw import plugin
from vllm_vtw.worker import runner_v1
from vllm_vtw.kv import groups, spec
from vllm_vtw.models import beam_search, request_check
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
from vllm.v1.core import kv_cache_utils
for _ in range(2):
    plugin.register()
    runner_v1.install()
    groups.install()
    beam_search.install()
    request_check.install()
def hooked(function):
    return hasattr(function, "__wrapped__")
def depth(function):
    return 1 + depth(function.__wrapped__) if hooked(function) else 0
print("registry", depth(ModelRegistry.inspect_model_cls), depth(ModelRegistry.resolve_model_cls))
print("runner", depth(GPUModelRunner._build_attention_metadata))
print("beams", depth(BeamSearchSequence.get_prompt))
for kind in ("token", "multimodal"):
    prompt = {"type": kind, "mm_kwargs": {}, "mm_hashes": {}, "mm_placeholders": {}}
    BeamSearchSequence(prompt, [1], []).get_prompt()
    beam_search.refuse(prompt)
    try:
        print("went on", BeamSearchSequence(prompt, [1], []).get_prompt())
    except ValueError as error:
        print("refused", str(error) == beam_search.REASON)
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
responses = depth(OpenAIServingResponses._generate_with_builtin_tools)
print("checks", depth(AsyncLLM.generate), depth(LLMEngine.add_request), responses)
class Processor(InputProcessor):
    model_config = SimpleNamespace(vtw_admission=Admission(Policy(()), 8, 0, 99))
    renderer = SimpleNamespace(mm_processor_cache=None)
    def __init__(self):
        pass
params = SamplingParams(extra_args={"vtw_layer": 3})
asked = ((AsyncLLM, "generate", ({}, params, "0")), (LLMEngine, "add_request", ("0", {}, params)))
for engine, name, given in asked:
    made = object.__new__(engine)
    made.input_processor = Processor()
    try:
        getattr(made, name)(*given)
    except VLLMValidationError as error:
        print("chosen", error)
print("groups", depth(kv_cache_utils._get_kv_cache_groups_uniform_page_size))
"""
ENGINE = """
import sys
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
import PIL.Image
llm = LLM(sys.argv[1], model_impl="vtw", additional_config={"vtw": {"layer": 1}}, dtype="float32",
          kv_cache_memory_bytes=1 << 25, max_model_len=512, enforce_eager=True, enable_prefix_caching=False)
image = PIL.Image.new("RGB", (140, 140), "orange")
prompt = {"prompt": "USER: <image> What? ASSISTANT:", "multi_modal_data": {"image": image}}
answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
print("HOOKED", hasattr(GPUModelRunner._build_attention_metadata, "__wrapped__"))
config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
print("GROUPS", [len(group.layer_names) for group in config.kv_cache_groups])
print("TOKENS", answer[0].outputs[0].token_ids)
"""


REFUSED = ["refused True", "refused True"]
CHOSEN = "chosen 'vtw_layer' = 3: this server offers 8 (nothing is withdrawn)"


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def targets(diff: Path) -> list[str]:
    return [
        line.removeprefix("+++ b/").strip() for line in diff.read_text().splitlines() if line[:4] == "+++ "
    ]


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A folder with vLLM in it as links, but for what the diffs change."""
    site = tmp_path_factory.mktemp("patched")
    changed = {Path(target) for diff in DIFFS for target in targets(diff)}
    folders = {Path("vllm")} | {parent for path in changed for parent in path.parents if parent.name}
    for folder in sorted(folders, key=lambda path: len(path.parts)):
        (site / folder).mkdir()
        for entry in (installed().parent / folder).iterdir():
            relative = folder / entry.name
            if relative in changed:
                shutil.copy(entry, site / relative)
            elif relative not in folders and entry.name != "__pycache__":
                (site / relative).symlink_to(entry)
    for diff in DIFFS:
        with diff.open() as lines:
            subprocess.run(["patch", "-p1", "--fuzz=0", "-d", str(site)], stdin=lines, check=True)
    return site


def run(code: str, *arguments: str, site: Path | None = None) -> list[str]:
    path = os.pathsep.join(filter(None, [str(site) if site else "", os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kept = (
        "registry",
        "runner",
        "beams",
        "refused",
        "checks",
        "chosen",
        "groups",
        "HOOKED",
        "GROUPS",
        "TOKENS",
    )
    return [line for line in result.stdout.splitlines() if line.startswith(kept)]


def test_there_is_one_diff_a_hook_and_a_row_for_each():
    assert [diff.name for diff in DIFFS] == [
        "beam-search.diff",
        "kv-cache-groups.diff",
        "model-impl.diff",
        "prepare-batch.diff",
        "request-check.diff",
    ]
    table = (PATCHES / "README.md").read_text()
    assert all(f"`{diff.name}`" in table for diff in DIFFS)


def test_the_hooks_are_there_once_without_the_patches():
    assert run(HOOKS) == [
        "registry 1 1",
        "runner 1",
        "beams 1",
        *REFUSED,
        "checks 1 1 1",
        CHOSEN,
        CHOSEN,
        "groups 1",
    ]


def test_no_hook_is_there_with_the_patches(patched):
    assert run(HOOKS, site=patched) == [
        "registry 0 0",
        "runner 0",
        "beams 0",
        *REFUSED,
        "checks 0 0 0",
        CHOSEN,
        CHOSEN,
        "groups 0",
    ]


def test_a_patched_engine_gives_the_same_answer(patched, tmp_path):
    from benchmarks.small_llava import SmallLlava

    model = str(SmallLlava(layers=8).save(tmp_path / "model"))
    hooked, unhooked = run(ENGINE, model), run(ENGINE, model, site=patched)
    assert hooked[0] == "HOOKED True"
    assert unhooked[0] == "HOOKED False"
    assert hooked[1:] == unhooked[1:]
    assert hooked[1] == "GROUPS [1, 7]"
