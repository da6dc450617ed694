# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Where nothing is withdrawn, the engine is stock vLLM: in tokens and in KV blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import GREEDY, MODEL, SHAPES, held_blocks, running, scheduler_of, step_until

TEXTS = [ask for ask in SHAPES if not ask.images]


def run(folder, reference, asks, vtw=None, **options):
    """Every answer, and after every step the blocks of each request in each group, with the group's pages."""
    held = []
    with running(folder, vtw, max_num_batched_tokens=128, **options) as llm:
        for number, ask in enumerate(asks):
            llm.llm_engine.add_request(str(number), ask.to_vllm(reference), GREEDY)
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        pages = [getattr(group.kv_cache_spec, "pages", 1) for group in groups]

        def note_blocks():
            held.append(
                {
                    int(request.split("-")[0]): list(zip(map(len, rows), pages, strict=True))
                    for request, rows in held_blocks(llm).items()
                }
            )

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note_blocks)
    answers = [outputs[str(number)].outputs[0].token_ids for number in range(len(asks))]
    return answers, held


@pytest.mark.parametrize("model", [MODEL, SmallLlava(layers=6, kv_heads=1, backbone="qwen2")])
@pytest.mark.parametrize("prefix_caching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_layer_left_without_pictures_is_stock(checkpoint, reference, model, prefix_caching):
    folder = checkpoint(model)
    # Twice, so that the second half finds the first in the cache.
    asks, options = SHAPES * 2, {"enable_prefix_caching": prefix_caching, "max_num_seqs": 6}
    stock = run(folder, reference(folder), asks, **options)
    assert run(folder, reference(folder), asks, {"layer": model.layers}, **options) == stock


@pytest.mark.parametrize("layer", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (4, 7))])
def test_texts_are_stock_at_every_layer(checkpoint, reference, layer):
    folder = checkpoint(MODEL)
    asks = TEXTS * 3
    answers, in_stock = run(folder, reference(folder), asks)
    with_plugin, held = run(folder, reference(folder), asks, {"layer": layer})
    assert with_plugin == answers
    for ours, theirs in zip(held, in_stock, strict=True):
        assert ours.keys() == theirs.keys()
        for request, groups in ours.items():
            ((blocks, _),) = theirs[request]
            assert all(number == -(-blocks // pages) for number, pages in groups)


WITHOUT_FLAG = """
from vllm import LLM, SamplingParams
from vllm.model_executor.models import ModelRegistry
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
import sys
model, image = sys.argv[1:]
from PIL import Image
llm = LLM(model, dtype="float32", kv_cache_memory_bytes=1 << 26, max_model_len=512, enforce_eager=True,
          additional_config={"vtw": {"layer": "not read"}})
prompt = {"prompt": "USER: <image> What? ASSISTANT:", "multi_modal_data": {"image": Image.open(image)}}
print("TOKENS", llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0]
      .outputs[0].token_ids)
config = llm.llm_engine.vllm_config
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
print("SCHEDULER", config.scheduler_config.scheduler_cls, type(scheduler))
print("ARCHITECTURES", sorted(name for name in ModelRegistry.models if "VTW" in name))
print("RUNNER", GPUModelRunner._build_attention_metadata.__module__,
      hasattr(GPUModelRunner._build_attention_metadata, "__wrapped__"))
loaded = (name for name in sys.modules if name.startswith("vllm_vtw."))
print("MODULES", sorted(name for name in loaded if ".models" not in name))
"""


def test_without_the_flag_the_plugin_is_not_there(checkpoint, tmp_path):
    """With the plugin loaded and with its kill switch: the same, down to what is patched."""
    from tests.engine.engines import A

    folder, image = checkpoint(MODEL), tmp_path / "a.png"
    A.save(image)

    def printed(**env: str) -> list[str]:
        output = subprocess.run(
            [sys.executable, "-c", WITHOUT_FLAG, str(folder), str(image)],
            env=os.environ | env,
            cwd=Path(folder).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [line for line in output.splitlines() if line.split(" ")[0].isupper()]

    loaded, disabled = printed(), printed(VLLM_VTW_DISABLE="1")
    assert loaded[:-1] == disabled[:-1]
    assert loaded[2] == "ARCHITECTURES []"
    assert loaded[3] == "RUNNER vllm.v1.worker.gpu_model_runner False"
    assert loaded[-1] == "MODULES ['vllm_vtw.families', 'vllm_vtw.plugin', 'vllm_vtw.versions']"
    assert disabled[-1] == "MODULES ['vllm_vtw.plugin', 'vllm_vtw.versions']"
