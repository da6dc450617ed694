# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Requests that choose the layer at which their visual tokens leave, in one batch with others."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.engines import (
    BLOCK_SIZE,
    FILLER,
    GREEDY,
    MODEL,
    SHAPES,
    A,
    Ask,
    assert_follows,
    free_blocks,
    held_blocks,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.gates import ASKED, assert_gated, dividing
from tests.engine.reference import Reference

LAYERS, DEFAULT = (2, 4, 6), 4
VTW = {"layers": [*LAYERS], "layer": DEFAULT}
OFFERED = (*LAYERS, MODEL.layers)


def asking(layer: int | None, **options: Any) -> SamplingParams:
    params = GREEDY.clone()
    params.extra_args = None if layer is None else {"vtw_layer": layer}
    for name, value in options.items():
        setattr(params, name, value)
    return params


def everyone(shift: int = 0) -> list[tuple[Ask, int | None]]:
    """All shapes of requests, every one with another choice than the one before."""
    choices = (*OFFERED, None)
    return [(ask, choices[(number + shift) % len(choices)]) for number, ask in enumerate(SHAPES)]


def answer(llm: Any, oracle: Reference, asked: Sequence[tuple[Ask, int | None]], **options: Any) -> list[Any]:
    prompts = [ask.to_vllm(oracle) for ask, _ in asked]
    return llm.generate(prompts, [asking(layer, **options) for _, layer in asked], use_tqdm=False)


def assert_right(
    oracle: Reference, asked: Sequence[tuple[Ask, int | None]], outputs: Sequence[Any], align: bool
) -> None:
    for (ask, layer), output in zip(asked, outputs, strict=True):
        align_to = BLOCK_SIZE if align else 1
        for one in output.outputs:
            assert len(one.token_ids) == GREEDY.max_tokens
            assert_follows(oracle, ask, output.prompt_token_ids, one.token_ids, layer or DEFAULT, align_to)


@pytest.mark.parametrize(
    ("align", "caching"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_a_batch_in_which_every_request_has_another_layer(checkpoint, reference, align, caching):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 8, "enable_prefix_caching": caching}
    with running(folder, VTW | {"align": align}, **options) as llm:
        all_free = free_blocks(llm)
        for shift in range(5):
            asked = everyone(shift)
            assert_right(oracle, asked, answer(llm, oracle, asked), align)
            assert free_blocks(llm) == all_free
        again = answer(llm, oracle, asked)
        assert_right(oracle, asked, again, align)
        alone = [answer(llm, oracle, [one])[0] for one in asked]
        assert [one.outputs[0].token_ids for one in alone] == [one.outputs[0].token_ids for one in again]
        assert not scheduler_of(llm).tasks
    if caching and align:
        assert sum(output.num_cached_tokens for output in again) > 0.7 * sum(
            len(output.prompt_token_ids) for output in again
        )


def test_the_image_is_shared_with_a_request_that_leaves_before_and_not_the_text_behind_it(
    checkpoint, reference
):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask = Ask("text around", f"USER: {FILLER}<image>\n{FILLER}What is this? ASSISTANT:", (A,))
    with running(folder, VTW | {"align": True}, enable_prefix_caching=True) as llm:
        cached: dict[int, list[int]] = {}
        for layer in (6, 6, 2, 2, 4, 8, 8):
            (output,) = answer(llm, oracle, [(ask, layer)])
            assert_right(oracle, [(ask, layer)], [output], align=True)
            cached.setdefault(layer, []).append(output.num_cached_tokens)
    visual = [at for at, token in enumerate(output.prompt_token_ids) if token == oracle.image_token]
    first_leaves = -(-visual[0] // BLOCK_SIZE) * BLOCK_SIZE
    last_leaves = (visual[-1] + 1) // BLOCK_SIZE * BLOCK_SIZE
    whole = (len(output.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert first_leaves < last_leaves < whole
    assert cached == {
        6: [0, whole],
        2: [last_leaves, whole],
        4: [last_leaves],
        8: [first_leaves, whole],
    }


def test_blocks_are_exact_from_the_first_token_on(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked, looked_at = everyone(), set()
    with running(folder, VTW | {"align": False}, max_num_batched_tokens=96) as llm:
        for number, (ask, layer) in enumerate(asked):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), asking(layer))
        assert isinstance(scheduler_of(llm), AsyncScheduler) == ("tests.engine.asynchronous" in sys.modules)
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        first_layers = [(0, *LAYERS)[getattr(group.kv_cache_spec, "stage", 0)] for group in groups]

        def check():
            held = held_blocks(llm)
            for request in scheduler_of(llm).running:
                ask, layer = asked[int(request.request_id.split("-")[0])]
                computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
                gone = sum(oracle.dropped(request.prompt_token_ids, prompt, 1)[:computed])
                for first_layer, row in zip(first_layers, held[request.request_id], strict=True):
                    retained = computed - (gone if first_layer >= (layer or DEFAULT) else 0)
                    assert len(row) == -(-retained // BLOCK_SIZE), (ask.name, first_layer, layer)
                looked_at.add((ask.name, layer, computed < prompt))

        finished = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), check)
        assert not held_blocks(llm)
    assert len(finished) == len(SHAPES)
    assert {name for name, _, in_prompt in looked_at if in_prompt} >= {"several apart", "text before"}
    assert_right(oracle, asked, [finished[str(number)] for number in range(len(asked))], align=False)


@pytest.mark.parametrize("caching", [pytest.param(False, marks=pytest.mark.slow), True])
def test_requests_that_are_preempted_keep_their_layer(checkpoint, reference, caching):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, layer) for ask, layer in everyone(1) if ask.name != "several apart"] * 2
    few = {"num_gpu_blocks_override": 44, "max_model_len": 320, "max_num_batched_tokens": 96}
    with running(folder, VTW | {"align": False}, enable_prefix_caching=caching, **few) as llm:
        for number, (ask, layer) in enumerate(asked):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), asking(layer))
        preempted = set()

        def note():
            for request in scheduler_of(llm).running:
                if request.num_preemptions:
                    preempted.add(asked[int(request.request_id.split("-")[0])][1])

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note)
    assert_right(oracle, asked, [outputs[str(number)] for number in range(len(asked))], align=False)
    assert len(preempted) > 2


def test_a_request_that_chooses_a_layer_is_not_asked_by_gates(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    chosen = [(ask, OFFERED[number % 4]) for number, ask in enumerate(SHAPES)]
    asked = [*chosen, *((ask, None) for ask in SHAPES)]
    with running(folder, gates.options, max_num_batched_tokens=640) as llm:
        outputs = answer(llm, oracle, asked)
        assert free_blocks(llm) == scheduler_of(llm).kv_cache_config.num_blocks - 1
    assert_right(oracle, chosen, outputs[: len(SHAPES)], align=False)
    exits = [
        assert_gated(oracle, ask, out, gates) for ask, out in zip(SHAPES, outputs[len(SHAPES) :], strict=True)
    ]
    assert len(set(exits)) > 2


def test_gates_do_not_hold_a_chosen_layer_to_one_step(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    (long,) = [ask for ask in ASKED if ask.name == "several apart"]
    with running(folder, gates.options, max_num_batched_tokens=96, max_num_seqs=8) as llm:
        outputs = answer(llm, oracle, [(long, 2), (long, 6), (long, MODEL.layers)])
        with pytest.raises(VLLMValidationError, match="from its first image on"):
            answer(llm, oracle, [(long, None)])
        with pytest.raises(
            VLLMValidationError, match=r"'vtw_layer' = 3: this server offers 2, 4, 6, 8 \(nothing is"
        ):
            answer(llm, oracle, [(long, 3)])
        outputs += answer(llm, oracle, [(long, 4)])
    assert_right(oracle, [(long, layer) for layer in (2, 6, MODEL.layers, 4)], outputs, align=False)


def test_tasks_of_a_policy_file(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    content = {
        "format": "vllm-vtw-policy/1",
        "model": {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden},
        "stages": [{"layer": 2, "keep": 0}, {"layer": 6, "keep": 0}],
        "ranking": None,
        "gate": None,
        "layer": MODEL.layers,
        "tasks": {"yes/no": 2, "ocr": 6, "caption": MODEL.layers},
    }
    file = Path(tmp_path) / "policy.json"
    file.write_text(json.dumps(content))
    ask = SHAPES[1]
    with running(folder, {"policy": str(file)}) as llm:
        params = [GREEDY.clone() for _ in range(4)]
        for one, task in zip(params, ("yes/no", "ocr", "caption"), strict=False):
            one.extra_args = {"vtw_task": task}
        outputs = llm.generate([ask.to_vllm(oracle)] * 4, params, use_tqdm=False)
        counts = scheduler_of(llm).statistics.take()
    for output, layer in zip(outputs, (2, 6, MODEL.layers, MODEL.layers), strict=True):
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, layer, align_to=1)
    assert {key: count for key, count in counts.items() if key.startswith("requests/")} == {
        "requests/2/yes/no": 1,
        "requests/6/ocr": 1,
        "requests/8/caption": 1,
        "requests/8/": 1,
    }


def test_a_choice_that_nobody_checked_ends_its_request_alone(checkpoint, reference, monkeypatch):
    """As from a front end without the plugin."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask = SHAPES[1]
    with running(folder, VTW | {"align": False}) as llm:
        monkeypatch.setattr("vllm_vtw.models.request_check.check", lambda *args: None)
        outputs = answer(llm, oracle, [(ask, 2), (ask, 5), (ask, 6)])
        assert free_blocks(llm) == scheduler_of(llm).kv_cache_config.num_blocks - 1
    assert outputs[1].outputs[0].finish_reason == "error"
    assert_right(oracle, [(ask, 2), (ask, 6)], [outputs[0], outputs[2]], align=False)


def test_several_answers_to_one_request_have_its_layer(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, layer) for ask, layer in everyone() if ask.images][:5]
    with running(folder, VTW | {"align": False}, max_num_batched_tokens=96) as llm:
        # The most probable token is sampled, as vLLM refuses several greedy answers.
        outputs = answer(llm, oracle, asked, n=2, temperature=1, top_k=1)
    assert all(len(output.outputs) == 2 for output in outputs)
    assert_right(oracle, asked, outputs, align=False)
