# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Quantized weights and KV caches: stock vLLM's answers at K = L, and those of a reference that rounds."""

import copy
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.engines import GREEDY, MODEL, SHAPES, Ask, running, worst_choice
from tests.engine.gates import LAYERS, dividing
from tests.engine.quantized import FORMATS, with_fp8_cache
from tests.engine.reference import Reference
from tests.engine.test_ranked import policy

LAYER = MODEL.layers // 2
MARGIN = 0.25
"""In logits. Rounding costs a token 0.13 at most. Answers that see too much or little lose at least 0.5."""


class Quantized(NamedTuple):
    """A checkpoint, options of its engine, and what answers as it does."""

    folder: Path
    options: dict[str, Any]
    oracle: Reference


@pytest.fixture(
    scope="module",
    params=[
        "int8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "awq", "gptq")),
        "KV cache of fp8",
    ],
)
def quantized(request, checkpoint, tmp_path_factory) -> Quantized:
    folder = checkpoint(MODEL)
    if request.param not in FORMATS:
        return Quantized(folder, {"kv_cache_dtype": "fp8"}, with_fp8_cache(folder))
    quantized_folder = tmp_path_factory.mktemp(request.param) / "model"
    # vLLM has no kernels for weights of 4 bits in float32.
    options = {"dtype": "bfloat16"} if request.param in ("awq", "gptq") else {}
    return Quantized(quantized_folder, options, FORMATS[request.param].save(folder, quantized_folder))


def answers(
    case: Quantized, vtw: dict[str, Any] | None, layers: Sequence[int | None] = (None,)
) -> list[tuple[Ask, Any]]:
    """All shapes of requests with what was answered, in turn without a choice or with these layers."""
    params = [copy.copy(GREEDY) for _ in SHAPES]
    for one, layer in zip(params, cycle(layers), strict=False):
        one.extra_args = None if layer is None else {"vtw_layer": layer}
    prompts = [ask.to_vllm(case.oracle) for ask in SHAPES]
    options = {"max_num_batched_tokens": 320, "max_num_seqs": 8} | case.options
    with running(case.folder, vtw, **options) as llm:
        return list(zip(SHAPES, llm.generate(prompts, params, use_tqdm=False), strict=True))


def shortfall(oracle: Reference, ask: Ask, output: Any, layer: int) -> float:
    return worst_choice(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, layer)


def test_all_layers(quantized, checkpoint, reference):
    stock, own = (answers(quantized, vtw) for vtw in (None, {"layer": MODEL.layers}))
    assert [output.outputs[0].token_ids for _, output in own] == [
        output.outputs[0].token_ids for _, output in stock
    ]
    rounded, plain = (
        max(shortfall(oracle, *answer, MODEL.layers) for answer in stock)
        for oracle in (quantized.oracle, reference(checkpoint(MODEL)))
    )
    assert rounded < MARGIN
    assert rounded < plain, "nothing was quantized"


def test_a_layer_per_request(quantized):
    vtw = {"layers": [2, LAYER], "layer": LAYER, "align": False}
    asked = None, 2, MODEL.layers
    for (ask, output), layer in zip(answers(quantized, vtw, asked), cycle((LAYER, *asked[1:])), strict=False):
        told, other = (quantized.oracle, ask, output), 2 if layer == MODEL.layers else MODEL.layers
        assert shortfall(*told, layer) < MARGIN, ask.name
        assert not ask.images or shortfall(*told, other) > MARGIN, ask.name


@pytest.mark.slow
def test_gates(quantized, tmp_path):
    gates, left = dividing(tmp_path, quantized.oracle), set()
    for ask, output in answers(quantized, gates.options):
        layer = gates.exit_layer(quantized.oracle, ask, output.prompt_token_ids)
        left.add(layer)
        assert shortfall(quantized.oracle, ask, output, layer) < MARGIN, ask.name
    assert left == {*LAYERS, MODEL.layers}


@pytest.mark.slow
def test_ranking(quantized):
    # Rankings that read keys are refused with an fp8 KV cache.
    ranking = "variation" if "kv_cache_dtype" in quantized.options else "last-token-attention"
    right, wrong = {3: 0.5, 5: 0.1}, {3: 0.5, 5: 0.3}
    noise = torch.Generator().manual_seed(0)

    def short_of(schedule: dict[int, float], ask: Ask, output: Any) -> float:
        """The least shortfall of a few readings. Rounding makes of a millionth another token that stays."""
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        readings = []
        for size in (0, 1e-6, 1e-6, 1e-6):
            embeds = [quantized.oracle.embeds(image) for image in ask.images]
            embeds = [image * (1 + size * torch.randn(image.shape, generator=noise)) for image in embeds]
            logits = quantized.oracle.ranked_logits(
                [*prompt, *answer], embeds, schedule, len(prompt), ranking
            )[:-1]
            readings.append(float((logits.max(-1).values - logits[range(len(answer)), answer]).max()))
        return min(readings)

    answered = answers(quantized, {"policy": policy(right, MODEL, ranking)})
    assert [ask.name for ask, output in answered if short_of(right, ask, output) > MARGIN] == []
    assert any(short_of(wrong, ask, output) > MARGIN for ask, output in answered)
