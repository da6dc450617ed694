# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""LoRA adapters: several in a batch, and in every stage those of its own tokens."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.engine.adapters import MODULES, Adapter, rows_without_adapters
from tests.engine.engines import (
    BLOCK_SIZE,
    FILLER,
    MODEL,
    SHAPES,
    A,
    Ask,
    assert_follows,
    free_blocks,
    running,
    scheduler_of,
)
from tests.engine.gates import assert_gated, dividing
from tests.engine.reference import Reference
from tests.engine.test_ranked import assert_ranked, written
from vllm_vtw.kv.guard import CLIENT

pytestmark = pytest.mark.usefixtures(rows_without_adapters.__name__)
LAYER = MODEL.layers // 2
SHORT = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
ENGINE = {
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 3,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
}


class Choice(NamedTuple):
    """An adapter as vLLM is asked for it, None for the model without one, and what answers with it."""

    request: LoRARequest | None
    oracle: Reference


@pytest.fixture(scope="module")
def choices(checkpoint, reference, tmp_path_factory) -> list[Choice]:
    """The model itself, and three adapters."""
    folder, adapters = checkpoint(MODEL), tmp_path_factory.mktemp("adapters")
    found = [Choice(None, reference(folder))]
    for seed in (1, 2, 3):
        adapter = Adapter(found[0].oracle, seed)
        path = adapter.save(adapters / str(seed))
        found.append(Choice(LoRARequest(f"adapter-{seed}", seed, str(path)), adapter.merged(folder)))
    return found


def everyone(choices: list[Choice]) -> list[tuple[Ask, Choice]]:
    """All shapes of requests, every one with another adapter than the one before."""
    return [(ask, choices[number % len(choices)]) for number, ask in enumerate(SHAPES * 2)]


def answer(
    llm: LLM, asked: list[tuple[Ask, Choice]], params: SamplingParams | list[SamplingParams] = SHORT
) -> Any:
    prompts = [ask.to_vllm(choice.oracle) for ask, choice in asked]
    return llm.generate(prompts, params, lora_request=[choice.request for _, choice in asked], use_tqdm=False)


def assert_right(
    asked: list[tuple[Ask, Choice]], outputs: Any, layers: list[int], align_to: int = BLOCK_SIZE
) -> None:
    for (ask, choice), output, layer in zip(asked, outputs, layers, strict=True):
        prompt, ids = output.prompt_token_ids, output.outputs[0].token_ids
        assert_follows(choice.oracle, ask, prompt, ids, layer, align_to)


@pytest.mark.parametrize("align", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_request_has_another_adapter(checkpoint, choices, align):
    asked = everyone(choices)
    with running(checkpoint(MODEL), {"layer": LAYER, "align": align}, **ENGINE) as llm:
        all_free = free_blocks(llm)
        for _ in range(2):
            outputs = answer(llm, asked)
            assert_right(asked, outputs, [LAYER] * len(asked), BLOCK_SIZE if align else 1)
            assert free_blocks(llm) == all_free
        # One after another, so that the batch has one adapter at a time.
        alone = [answer(llm, [one])[0].outputs[0].token_ids for one in asked[:8]]
        assert alone == [output.outputs[0].token_ids for output in outputs[:8]]
    one_prompt: dict[Choice, list] = {choice: [] for choice in choices}
    for (ask, choice), output in zip(asked, outputs, strict=True):
        if ask.name == "no image":
            one_prompt[choice].append(output.outputs[0].token_ids)
    answers = [ids for found in one_prompt.values() for ids in found]
    assert len(answers) == len({tuple(ids) for ids in answers}) == 2


@pytest.mark.parametrize("caching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stock(checkpoint, choices, caching):
    asked, options = everyone(choices), ENGINE | {"enable_prefix_caching": caching}
    answers = []
    for vtw in (None, {"layer": MODEL.layers}):
        with running(checkpoint(MODEL), vtw, **options) as llm:
            outputs = [*answer(llm, asked), *answer(llm, asked)]
            answers.append([(output.outputs[0].token_ids, output.num_cached_tokens) for output in outputs])
    assert answers[0] == answers[1]


def test_requests_share_cached_blocks_with_those_of_their_adapter_only(checkpoint, choices):
    ask = Ask("text around", f"USER: {FILLER}<image>\n{FILLER}What is this? ASSISTANT:", (A,))
    vtw = {"layers": [2, LAYER], "layer": LAYER, "align": True}
    with running(checkpoint(MODEL), vtw, **ENGINE, enable_prefix_caching=True) as llm:
        cached = []
        for choice in [*choices[:3], *choices[:3]]:
            asked = [(ask, choice)]
            outputs = answer(llm, asked)
            assert_right(asked, outputs, [LAYER])
            cached.append(outputs[0].num_cached_tokens)
        layers = [2, LAYER, MODEL.layers]
        asked = [(one, choice) for one, choice in everyone(choices) for _ in layers]
        layers *= len(everyone(choices))
        params = [
            SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args={"vtw_layer": layer})
            for layer in layers
        ]
        assert_right(asked, answer(llm, asked, params), layers)
    assert cached[:3] == [0, 0, 0]
    whole = (len(outputs[0].prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert cached[3:] == [whole] * 3


def test_a_guard_reads_answers_with_their_adapters(checkpoint, choices):
    options = ENGINE | {"lora_target_modules": [*MODULES]}
    asked = everyone(choices)
    # At K = 7, blocks of the last layer hold several pages.
    with running(checkpoint(MODEL), {"layer": 7, "guard": {"share": 1}}, **options) as llm:
        outputs = answer(llm, asked)
        while scheduler_of(llm).has_requests():
            llm.llm_engine.step()
        counts = Counter(scheduler_of(llm).statistics.take())
    assert_right(asked, outputs, [7] * len(asked), 1)
    assert counts["guard_requests/7/"] > 4
    # Read without its adapter, hardly any token would be the most probable one.
    assert counts["guard_greedy_tokens/7/"] == counts["guard_tokens/7/"] == 16 * counts["guard_requests/7/"]


def test_a_reading_makes_way_for_another_adapter(checkpoint, choices):
    """A step has room for one adapter, and the reading takes several steps."""
    options = ENGINE | {"max_loras": 1, "lora_target_modules": [*MODULES]}
    long = next(ask for ask in SHAPES if ask.name == "several apart")
    with running(checkpoint(MODEL), {"layer": LAYER, "guard": {"share": 1}}, **options) as llm:
        answer(llm, [(long, choices[1])])
        for _ in range(2):
            llm.llm_engine.step()
        assert [request.client_index for request in scheduler_of(llm).running] == [CLIENT]
        asked = [(long, choices[2])]
        outputs = answer(llm, asked)
        while scheduler_of(llm).has_requests():
            llm.llm_engine.step()
        counts = Counter(scheduler_of(llm).statistics.take())
    assert_right(asked, outputs, [LAYER], 1)
    assert counts[f"guard_requests/{LAYER}/"] == 2


@pytest.mark.parametrize(
    "schedule", [{2: 0.5, 5: 0.05}, pytest.param({1: 0.7, 4: 0.0}, marks=pytest.mark.slow)]
)
def test_adapters_rank_by_their_own_attention(checkpoint, choices, tmp_path, schedule):
    asked = everyone(choices)
    options = ENGINE | {"max_num_batched_tokens": 640}
    with running(checkpoint(MODEL), written(tmp_path, schedule), **options) as llm:
        outputs = answer(llm, asked)
    for (ask, choice), output in zip(asked, outputs, strict=True):
        assert_ranked(choice.oracle, ask, output, schedule)


def test_gates_see_the_states_of_adapters(checkpoint, choices, tmp_path):
    gates = dividing(tmp_path, choices[0].oracle)
    asked = [(ask, choice) for choice in choices for ask in SHAPES]
    options = ENGINE | {"max_num_batched_tokens": 640}
    with running(checkpoint(MODEL), gates.options, **options) as llm:
        outputs = answer(llm, asked)
    exits: dict[Any, list[int]] = {choice.request: [] for choice in choices}
    for (ask, choice), output in zip(asked, outputs, strict=True):
        exits[choice.request].append(assert_gated(choice.oracle, ask, output, gates))
    assert len({tuple(layers) for layers in exits.values()}) > 1
