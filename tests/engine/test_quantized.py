# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Quantized weights and KV caches: answers of stock vLLM at K = L, and of a reference that rounds at less."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.engines import GREEDY, MODEL, SHAPES, running, worst_choice
from tests.engine.quantized import FORMATS, with_fp8_cache
from tests.engine.reference import Reference

LAYER = MODEL.layers // 2


class Quantized(NamedTuple):
    """A checkpoint, options of its engine, and what answers as it does."""

    folder: Path
    options: dict[str, Any]
    oracle: Reference


@pytest.fixture(
    scope="module",
    params=[
        "compressed-tensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("awq", "gptq", "fp8")),
        "KV cache of fp8",
    ],
)
def quantized(request, checkpoint, tmp_path_factory) -> Quantized:
    folder = checkpoint(MODEL)
    if request.param not in FORMATS:
        return Quantized(folder, {"kv_cache_dtype": "fp8"}, with_fp8_cache(folder))
    written = tmp_path_factory.mktemp(request.param) / "model"
    return Quantized(written, {}, FORMATS[request.param].save(folder, written))


def answers(case: Quantized, vtw: dict[str, Any] | None) -> list[Any]:
    prompts = [ask.to_vllm(case.oracle) for ask in SHAPES]
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 8, "dtype": "bfloat16"} | case.options
    with running(case.folder, vtw, **options) as llm:
        return llm.generate(prompts, GREEDY, use_tqdm=False)


def test_full_model(quantized):
    stock, own = (
        [output.outputs[0].token_ids for output in answers(quantized, vtw)]
        for vtw in (None, {"layer": MODEL.layers})
    )
    assert own == stock


def test_half_of_the_layers(quantized):
    worst = {}
    for layers in (LAYER, MODEL.layers):
        for ask, output in zip(SHAPES, answers(quantized, {"layer": LAYER, "align": False}), strict=True):
            told = quantized.oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids
            worst[ask.name, layers] = worst_choice(*told, layers)
    print(worst)
