# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The guard, which reads answers again: what it counts, and that users come first."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    MODEL,
    SHAPES,
    Ask,
    assert_follows,
    free_blocks,
    logprobs_of,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.gates import dividing
from tests.engine.reference import Reference
from tests.engine.test_image_rankings import leaving
from tests.engine.test_image_rankings import policy as by_image
from vllm_vtw.kv import guard, guarded_scheduler
from vllm_vtw.metrics import DIFFERENCE_BUCKETS

LAYER = 2
VTW = {"layer": LAYER, "align": False, "guard": {"share": 1}}
IMAGES = [ask for ask in SHAPES if ask.images]
SAMPLED = SamplingParams(temperature=1, seed=7, max_tokens=24, ignore_eos=True)


def ids_of_readings(llm: LLM) -> list[str]:
    return [request for request in scheduler_of(llm).requests if request.startswith("vtw-guard-")]


def finish(llm: LLM) -> None:
    """Steps until nothing is left to read."""
    step_until(llm, lambda: not scheduler_of(llm).has_requests())


def logprobs(oracle: Reference, ask: Ask, output: Any, layer: int, align_to: int = 1) -> torch.Tensor:
    """Of the tokens that might have stood at each place of an answer, shape `(tokens, vocabulary)`."""
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    token_ids = [*prompt, *answer]
    dropped = oracle.dropped(token_ids, len(prompt), align_to)
    embeds = [oracle.embeds(image) for image in ask.images]
    return logprobs_of(oracle.logits(token_ids, embeds, layer, dropped)[len(prompt) - 1 : -1])


def seen(counts: dict[str, int], layer: int, task: str = "") -> dict[str, int]:
    names = ("guard_requests", "guard_tokens", "guard_greedy_tokens", "guard_changed_tokens")
    return {name: counts.get(f"{name}/{layer}/{task}", 0) for name in names}


def assert_counts(
    oracle: Reference, asked: list[tuple[Ask, SamplingParams]], outputs: list[Any], counts: dict[str, int]
) -> int:
    """What was counted is what the oracle finds. Returns how many tokens the full model would not choose."""
    tokens = greedy = changed = 0
    differences = []
    for (ask, params), output in zip(asked, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        places = range(len(answer))
        full = logprobs(oracle, ask, output, MODEL.layers)
        tokens += len(answer)
        if params.temperature == 0:
            greedy += len(answer)
            changed += int((full.argmax(-1) != torch.tensor(answer)).sum())
        if output.prompt_token_ids[-1] != oracle.image_token:
            withdrawn = logprobs(oracle, ask, output, LAYER)
            differences += (full - withdrawn)[places, answer].abs().tolist()
    assert seen(counts, LAYER) == {
        "guard_requests": len(asked),
        "guard_tokens": tokens,
        "guard_greedy_tokens": greedy,
        "guard_changed_tokens": changed,
    }
    buckets = Counter(np.searchsorted(DIFFERENCE_BUCKETS, differences).tolist())
    for bucket in range(len(DIFFERENCE_BUCKETS) + 1):
        # A difference next to a bound may fall on its other side.
        assert abs(counts.get(f"guard_difference/{bucket}/{LAYER}/", 0) - buckets[bucket]) <= 2
    total = sum(value for key, value in counts.items() if key.startswith("guard_difference_sum/"))
    assert total / 1e9 == pytest.approx(sum(differences), rel=1e-3)
    return changed


def test_what_is_counted_is_what_the_full_model_says(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, params) for params in (GREEDY, SAMPLED) for ask in IMAGES]
    with running(folder, VTW, max_num_batched_tokens=640) as llm:
        all_free = free_blocks(llm)
        scheduler_of(llm).statistics.take()
        prompts = [ask.to_vllm(oracle) for ask, _ in asked]
        outputs = []
        for prompt, (_, params) in zip(prompts, asked, strict=True):
            outputs += llm.generate(prompt, params, use_tqdm=False)
            finish(llm)
        counts = scheduler_of(llm).statistics.take()
        assert not scheduler_of(llm).requests
        assert free_blocks(llm) == all_free
    assert sum(count for key, count in counts.items() if key.startswith("requests/")) == len(asked)
    changed = assert_counts(oracle, asked, outputs, counts)
    assert changed > 20
    assert not any(key.startswith("guard_left_out") for key in counts)
    for (ask, params), output in zip(asked, outputs, strict=True):
        if params is GREEDY:
            answer = output.outputs[0].token_ids
            assert_follows(oracle, ask, output.prompt_token_ids, answer, LAYER, align_to=1)


def test_what_has_nothing_to_read_is_passed_over(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    text, image = SHAPES[0], SHAPES[1]
    stay = GREEDY.clone()
    stay.extra_args = {"vtw_layer": MODEL.layers}
    with running(folder, VTW) as llm:
        llm.generate([ask.to_vllm(oracle) for ask in (text, image)], [GREEDY, stay], use_tqdm=False)
        assert scheduler_of(llm).guard.num_answers == 0
        llm.llm_engine.add_request("aborted", image.to_vllm(oracle), GREEDY)
        for _ in range(4):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["aborted"])
        finish(llm)
        outputs = []
        changes = {
            "logit_bias": {5: 1.0},
            "repetition_penalty": 1.5,
            "min_tokens": 3,
            "allowed_token_ids": [5],
        }
        for name, value in changes.items():
            params = GREEDY.clone()
            setattr(params, name, value)
            outputs += llm.generate(image.to_vllm(oracle), params, use_tqdm=False)
        finish(llm)
        counts = scheduler_of(llm).statistics.take()
    assert seen(counts, LAYER)["guard_tokens"] == len(changes) * GREEDY.max_tokens
    # Only those tokens count that the model finds most probable, whatever keeps the request from others.
    greedy = 0
    for output in outputs:
        answer = torch.tensor(output.outputs[0].token_ids)
        greedy += int((logprobs(oracle, image, output, LAYER).argmax(-1) == answer).sum())
    assert 0 < greedy < len(changes) * GREEDY.max_tokens
    assert seen(counts, LAYER)["guard_greedy_tokens"] == greedy


@pytest.mark.parametrize("caching", [pytest.param(False, marks=pytest.mark.slow), True])
def test_users_come_first(checkpoint, reference, monkeypatch, caching):
    """Blocks are few, so readings are cut off, and answers stay right."""
    monkeypatch.setattr(guarded_scheduler, "STEP_TOKENS", 24)
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [ask for ask in IMAGES if ask.name != "several apart"] * 3
    options = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 48, "max_model_len": 320}
    vtw = VTW | {"layers": [2, 5]}
    del vtw["layer"]
    with running(folder, vtw, enable_prefix_caching=caching, max_num_seqs=4, **options) as llm:
        scheduler = scheduler_of(llm)
        all_free = free_blocks(llm)
        original, steps = scheduler.schedule, []

        def schedule(*args: Any, **given: Any) -> Any:
            output = original(*args, **given)
            of_readings = {
                name: tokens
                for name, tokens in output.num_scheduled_tokens.items()
                if name.startswith("vtw-guard-")
            }
            users = [request for request in scheduler.waiting if not request.request_id.startswith("vtw-")]
            steps.append((of_readings, len(users)))
            assert len(scheduler.running) <= 4
            return output

        scheduler.schedule = schedule
        outputs = {}
        for number, ask in enumerate(asked):
            params = GREEDY.clone()
            params.extra_args = {"vtw_layer": (2, 5)[number % 2]}
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), params)
            for _ in range(13):
                for output in llm.llm_engine.step():
                    if output.finished:
                        outputs[output.request_id] = output
        outputs |= step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())
        finish(llm)
        counts = scheduler.statistics.take()
        assert free_blocks(llm) == all_free
        assert not scheduler.requests
    for number, ask in enumerate(asked):
        output = outputs[str(number)]
        layer = (2, 5)[number % 2]
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, layer, align_to=1)
    assert all(sum(tokens.values()) <= 24 and len(tokens) <= 1 for tokens, _ in steps)
    assert not any(tokens and waiting for tokens, waiting in steps), "a reading ran while a request waited"
    assert sum(len(tokens) for tokens, _ in steps) > 50
    read = sum(seen(counts, layer)["guard_requests"] for layer in (2, 5))
    left_out = sum(count for key, count in counts.items() if key.startswith("guard_left_out/"))
    assert read + left_out == len(asked)
    assert min(read, left_out) > 0


def test_a_full_queue_and_a_long_answer_are_left_out(checkpoint, reference, monkeypatch):
    monkeypatch.setattr(guard, "MAX_QUEUE", 2)
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    image = SHAPES[1]
    with running(folder, VTW, max_model_len=192, max_num_batched_tokens=640) as llm:
        long = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        llm.generate(image.to_vllm(oracle), long, use_tqdm=False)
        llm.generate([image.to_vllm(oracle)] * 5, GREEDY, use_tqdm=False)
        finish(llm)
        counts = scheduler_of(llm).statistics.take()
    assert {key: count for key, count in counts.items() if "left_out" in key} == {
        "guard_left_out/too_long": 1,
        "guard_left_out/queue_full": 3,
    }
    assert seen(counts, LAYER)["guard_requests"] == 2


@pytest.mark.parametrize("seats", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_request_that_arrives_gets_the_seat_of_a_reading(checkpoint, reference, seats):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask, times = SHAPES[1], 0
    with running(folder, VTW, max_num_seqs=seats, max_num_batched_tokens=32) as llm:
        llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
        outputs: dict[str, Any] = {}
        for number in range(4 * seats):
            while number % seats == 0 and not ids_of_readings(llm):
                llm.llm_engine.step()
            times += bool(ids_of_readings(llm))
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
            if number % seats == seats - 1:
                outputs |= step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())
        finish(llm)
    assert times >= 4
    for output in outputs.values():
        answer = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, answer, LAYER, align_to=1)


def test_answers_that_a_stop_string_ends_are_read(checkpoint, reference):
    """The front end finds it, and aborts the request."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask = SHAPES[1]
    with running(folder, VTW, max_num_batched_tokens=640) as llm:
        (whole,) = llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
        finish(llm)
        scheduler_of(llm).statistics.take()
        params = GREEDY.clone()
        params.stop = [whole.outputs[0].text[5:9]]
        (stopped,) = llm.generate(ask.to_vllm(oracle), params, use_tqdm=False)
        finish(llm)
        counts = scheduler_of(llm).statistics.take()
    assert stopped.outputs[0].finish_reason == "stop"
    assert seen(counts, LAYER)["guard_requests"] == 1
    assert 0 < seen(counts, LAYER)["guard_tokens"] < GREEDY.max_tokens


@pytest.mark.parametrize(
    "interrupt",
    [
        lambda llm: scheduler_of(llm).set_pause_state(PauseState.PAUSED_NEW),
        lambda llm: scheduler_of(llm).finish_requests(None, RequestStatus.FINISHED_ABORTED),
        lambda llm: scheduler_of(llm).reset_prefix_cache(),
        lambda llm: scheduler_of(llm).reset_prefix_cache(reset_running_requests=True),
        lambda llm: scheduler_of(llm)._end_with_error(
            scheduler_of(llm).requests[ids_of_readings(llm)[0]], "a fault"
        ),
    ],
    ids=["paused", "all aborted", "cache emptied", "all preempted", "an error"],
)
def test_readings_can_be_interrupted(checkpoint, reference, interrupt: Callable[[LLM], Any]):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    with running(folder, VTW, enable_prefix_caching=True, max_num_batched_tokens=32) as llm:
        all_free = free_blocks(llm)
        ask = SHAPES[1]
        for _ in range(2):
            llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
        while not ids_of_readings(llm):
            llm.llm_engine.step()
        assert interrupt(llm) in (True, [], None)
        finish(llm)
        scheduler_of(llm).set_pause_state(PauseState.UNPAUSED)
        assert free_blocks(llm) == all_free
        assert not scheduler_of(llm).requests
        scheduler_of(llm).statistics.take()
        output = llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0]
        finish(llm)
        counts = scheduler_of(llm).statistics.take()
    assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, LAYER, align_to=1)
    assert seen(counts, LAYER)["guard_requests"] == 1


def test_gates_are_read_again_with_the_layer_that_they_chose(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    with running(folder, gates.options | {"guard": {"share": 1}}, max_num_batched_tokens=640) as llm:
        expected: Counter[int] = Counter()
        total = 0.0
        for ask in SHAPES:
            (output,) = llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
            finish(llm)
            layer = gates.exit_layer(oracle, ask, output.prompt_token_ids)
            if layer < MODEL.layers:
                expected[layer] += 1
                full = logprobs(oracle, ask, output, MODEL.layers)
                withdrawn = logprobs(oracle, ask, output, layer)
                answer = list(output.outputs[0].token_ids)
                total += float((full - withdrawn)[range(len(answer)), answer].abs().sum())
        counts = scheduler_of(llm).statistics.take()
    assert expected.total() > 2
    assert {layer: seen(counts, layer)["guard_requests"] for layer in expected} == expected
    sums = [count for key, count in counts.items() if key.startswith("guard_difference_sum/")]
    assert sum(sums) / 1e9 == pytest.approx(total, rel=1e-3)


def test_whole_blocks_that_stay_are_read_again_as_they_were_computed(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    vtw = VTW | {"align": True}
    ask = next(ask for ask in IMAGES if ask.name == "text before")
    with running(folder, vtw, enable_prefix_caching=True, max_num_batched_tokens=640) as llm:
        (output,) = llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
        finish(llm)
        counts = scheduler_of(llm).statistics.take()
    full = logprobs(oracle, ask, output, MODEL.layers)
    withdrawn = logprobs(oracle, ask, output, LAYER, BLOCK_SIZE)
    answer = list(output.outputs[0].token_ids)
    sums = [count for key, count in counts.items() if key.startswith("guard_difference_sum/")]
    total = float((full - withdrawn)[range(len(answer)), answer].abs().sum())
    assert sum(sums) / 1e9 == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("ranking", ["diversity", pytest.param("uniform", marks=pytest.mark.slow)])
def test_shares_are_read_again_as_they_were_kept(checkpoint, reference, ranking):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = by_image({0: 0.5}, ranking) | {"guard": {"share": 1}}
    options["policy"]["keeps"] = [0.25]
    fewer = GREEDY.clone()
    fewer.extra_args = {"vtw_keep": 0.25}
    asked = [(ask, keep) for ask in IMAGES if not ask.prompt.endswith("<image>") for keep in (0.5, 0.25)]
    differences = 0.0
    with running(folder, options, max_num_batched_tokens=640) as llm:
        for ask, keep in asked:
            params = GREEDY if keep == 0.5 else fewer
            (output,) = llm.generate(ask.to_vllm(oracle), params, use_tqdm=False)
            finish(llm)
            prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            left = leaving(oracle, ask, prompt, {0: keep}, ranking, [""] * len(ask.images))
            embeds = [oracle.embeds(image) for image in ask.images]
            of_answer = slice(-len(answer) - 1, -1)
            own = oracle.selected_logits([*prompt, *answer], embeds, left)[of_answer].log_softmax(-1)
            full = logprobs(oracle, ask, output, MODEL.layers)
            differences += float((full - own)[range(len(answer)), answer].abs().sum())
        counts = scheduler_of(llm).statistics.take()
    assert counts["guard_requests/0/"] == len(asked)
    total = sum(value for key, value in counts.items() if key.startswith("guard_difference_sum/"))
    assert total / 1e9 == pytest.approx(differences, rel=1e-3)
    assert differences > 1
