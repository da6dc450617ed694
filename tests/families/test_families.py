# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Greedy answers in float32 of every family equal the oracle's, token for token."""

import pytest

from tests.engine.engines import BLOCK_SIZE, free_blocks, running, scheduler_of, step_until
from tests.engine.gates import gated, random_gates
from tests.engine.test_image_rankings import policy
from tests.engine.test_ranked import written
from tests.families.checkpoints import CHECKPOINTS, LAYERS
from tests.families.oracle import FamilyOracle
from tests.families.requests import (
    FAMILIES,
    GREEDY,
    asks,
    assert_answers,
    assert_ranked_answers,
    but_one,
    engine,
    shape,
    slow,
)

LIKE_OTHERS = (
    "eagle",
    "glm4v_moe",
    "idefics3",
    "internvl_chat",
    "internvl_chat_video",
    "llava_next",
    "llava_onevision2",
    "llava_over_pixtral",
    "pixtral",
    "qwen2_vl",
)
"""Families that differ little from another one. All their tests are slow."""


@pytest.mark.parametrize(
    "layer", [LAYERS // 2, *(pytest.param(k, marks=slow) for k in (1, LAYERS - 1, LAYERS))]
)
@pytest.mark.parametrize("align", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow if name in LIKE_OTHERS else ()) for name in FAMILIES]
)
def test_answers(family_checkpoint, oracle, name, align, layer):
    family = FAMILIES[name]
    layer = max(layer, family.first)
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    options = engine(family, enable_prefix_caching=align)
    with running(family_checkpoint(name), {"layer": layer, "align": align}, **options) as llm:
        all_free = free_blocks(llm)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        again = llm.generate(prompts, GREEDY, use_tqdm=False) if align else []
        assert free_blocks(llm) == all_free
    assert_answers(oracle(name), family, outputs, layer, BLOCK_SIZE if align else 1)
    if align:
        assert any(output.num_cached_tokens for output in again)
        assert_answers(oracle(name), family, again, layer, BLOCK_SIZE)


@pytest.mark.parametrize("name", but_one("qwen3_vl"))
def test_with_all_layers_it_is_stock_vllm(family_checkpoint, name):
    family = FAMILIES[name]
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    told = []
    for vtw in (None, {"layer": LAYERS}):
        with running(family_checkpoint(name), vtw, **engine(family)) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        told.append([output.outputs[0].token_ids for output in outputs])
    assert told[0] == told[1]


@pytest.mark.parametrize("name", but_one("qwen2_5_vl"))
def test_requests_choose_their_layers_and_a_guard_reads_their_answers(family_checkpoint, oracle, name):
    family, asked = FAMILIES[name], list(asks(FAMILIES[name]).values())
    layers = (2, LAYERS - 1, LAYERS)
    params = [GREEDY.clone() for _ in layers for _ in asked]
    for number, one in enumerate(params):
        one.extra_args = {"vtw_layer": layers[number // len(asked)]}
    vtw = {"layers": [*layers], "align": False, "guard": {"share": 1}}
    with running(family_checkpoint(name), vtw, **engine(family)) as llm:
        outputs = llm.generate([ask.to_vllm() for ask in asked * len(layers)], params, use_tqdm=False)
        step_until(llm, lambda: not scheduler_of(llm).has_requests())
        counts = scheduler_of(llm).statistics.take()
    for number, layer in enumerate(layers):
        of_layer = outputs[number * len(asked) : (number + 1) * len(asked)]
        assert_answers(oracle(name), family, of_layer, layer, 1)
    read = {key: count for key, count in counts.items() if key.startswith("guard_requests/")}
    assert read.keys() == {"guard_requests/2/", f"guard_requests/{LAYERS - 1}/"}
    assert "guard_left_out/failed" not in counts


@pytest.mark.parametrize("name", but_one("internvl"))
def test_a_ranked_schedule(family_checkpoint, oracle, tmp_path, name):
    family, schedule = FAMILIES[name], {2: 0.5, 4: 0.1}
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    options = written(tmp_path, schedule, shape(name))
    with running(family_checkpoint(name), options, **engine(family)) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert_ranked_answers(oracle(name), family, outputs, schedule)


@pytest.mark.parametrize(
    ("name", "ranking"),
    [
        *(pytest.param(*name.values, "uniform", marks=name.marks) for name in but_one("qwen2_5_vl")),
        *(pytest.param(*name.values, "diversity", marks=name.marks) for name in but_one("qwen3_vl")),
    ],
)
def test_a_ranking_by_image(family_checkpoint, oracle, name, ranking):
    """From layer 0 on, but behind the layers to which visual features are added."""
    family = FAMILIES[name]
    layer = family.first if family.first > 1 else 0
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    options = policy({layer: 0.3}, ranking, shape(name))
    with running(family_checkpoint(name), options, **engine(family)) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert_answers(oracle(name), family, outputs, layer, 1, keep=0.3, ranking=ranking)


@pytest.mark.parametrize("name", but_one("mistral3"))
def test_gates(family_checkpoint, oracle, tmp_path, name):
    """With one threshold, which lies in the widest gap between the requests."""
    family, layer, weights = FAMILIES[name], 2, random_gates([2], shape(name))
    asked = asks(family)
    encoded = {
        kind: oracle(name).encode(family.for_oracle(ask.prompt), ask.images, ask.videos)
        for kind, ask in asked.items()
    }
    margins = {kind: oracle(name).margins(one, weights)[layer] for kind, one in encoded.items() if one.visual}
    ascending = sorted([min(margins.values()) - 1, *margins.values()])
    first = 2 if len(margins) > 1 else 1
    gap, at = max((ascending[n] - ascending[n - 1], n) for n in range(first, len(ascending)))
    assert gap > 1e-3
    threshold = ascending[at] - gap / 2
    gates = gated(tmp_path, weights, [threshold], shape(name))
    with running(family_checkpoint(name), gates.options, **engine(family)) as llm:
        outputs = llm.generate([ask.to_vllm() for ask in asked.values()], GREEDY, use_tqdm=False)
    for kind, output in zip(asked, outputs, strict=True):
        leaves = margins.get(kind, threshold) > threshold
        answer = output.outputs[0].token_ids
        leaving = encoded[kind].leaving(family.bridge, 1) if leaves else set()
        logits = oracle(name).logits(encoded[kind], answer, layer, leaving)
        assert list(answer) == logits.argmax(-1).tolist(), kind


@slow
@pytest.mark.parametrize(
    ("name", "text_model"),
    [("internvl", "qwen3_moe"), ("internvl_chat", "qwen2"), ("llava_next", "llama"), ("llava_next", "qwen2")],
)
def test_other_text_models(tmp_path, name, text_model):
    family, folder = FAMILIES[name], CHECKPOINTS[name](tmp_path / "model", text_model)
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    with running(folder, {"layer": 2, "align": False}, **engine(family)) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert_answers(FamilyOracle(folder), family, outputs, 2, 1)
