# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is long, or goes wrong, with one request is no other's trouble where gates decide or tokens rank."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams, RequestOutputKind
from vllm.v1.request import Request, RequestStatus

from tests.engine.engines import (
    GREEDY,
    MODEL,
    A,
    Ask,
    B,
    C,
    free_blocks,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.gates import assert_gated, dividing
from tests.engine.reference import Reference
from tests.engine.test_ranked import SCHEDULES, assert_ranked, written
from vllm_vtw.config import EXITS
from vllm_vtw.kv.prefill_turns import PATIENCE

LONG = Ask("long", "<image>\nand <image>\nWhat differs between them? ASSISTANT:", (A, B))
LATER = Ask("as long", "<image>\nand <image>\nWhat differs between them? ASSISTANT:", (C, B))
BEHIND = Ask("behind text", "USER: Look at this. <image>\nand <image>\nWhat differs? ASSISTANT:", (B, A))
TEXT = Ask("text", "USER: Tell me a story. ASSISTANT:")
DECODING = SamplingParams(temperature=0, max_tokens=8 * PATIENCE, ignore_eos=True)


class Engine(NamedTuple):
    """An engine whose steps take `LONG` and nothing beside it."""

    llm: LLM
    oracle: Reference
    check: Callable[[Ask, Any], Any]


def tokens_of(oracle: Reference, ask: Ask) -> int:
    text = ask.prompt.replace("<image>", "<image>" * MODEL.image_side**2)
    return len(oracle.processor.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module", params=["ranked", "gated"])
def engine(request, checkpoint, reference, tmp_path_factory) -> Iterator[Engine]:
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    tmp_path = tmp_path_factory.mktemp("policy")
    check: Callable[[Ask, Any], Any]
    if request.param == "ranked":
        schedule = SCHEDULES["two stages"]
        vtw = written(tmp_path, schedule)
        check = lambda ask, output: assert_ranked(oracle, ask, output, schedule)  # noqa: E731
    else:
        gates = dividing(tmp_path, oracle)
        vtw = gates.options
        check = lambda ask, output: assert_gated(oracle, ask, output, gates)  # noqa: E731
    options = {"enable_prefix_caching": True, "max_num_seqs": 8}
    with running(folder, vtw, max_num_batched_tokens=tokens_of(oracle, LONG), **options) as llm:
        yield Engine(llm, oracle, check)


def add(engine: Engine, name: str, ask: Ask, params: SamplingParams = GREEDY) -> None:
    params = params.clone()
    params.output_kind = RequestOutputKind.CUMULATIVE  # `LLM.generate` asks for the last one only
    engine.llm.llm_engine.add_request(name, ask.to_vllm(engine.oracle), params)


def named(engine: Engine, name: str) -> Request:
    """The scheduler's request; the front end puts something behind the name."""
    (found,) = [one for key, one in scheduler_of(engine.llm).requests.items() if key.split("-")[0] == name]
    return found


def finished(engine: Engine) -> dict[str, Any]:
    return step_until(engine.llm, lambda: not engine.llm.llm_engine.has_unfinished_requests())


@pytest.mark.parametrize("long", [[LONG], [LONG, LATER], [BEHIND]], ids=["one", "two", "behind text"])
def test_a_prompt_as_long_as_a_step_starts_and_holds_nobody_up(engine, long):
    """Decodes that run on leave no whole step. The text behind the long prompts starts within four steps, and
    the n-th of them within n turns."""
    for number in range(3):
        add(engine, f"decode{number}", TEXT, DECODING)
    for _ in range(3):
        engine.llm.llm_engine.step()
    assert len(scheduler_of(engine.llm).running) == 3
    for number, ask in enumerate(long):
        add(engine, f"long{number}", ask)
    add(engine, "short", TEXT)
    started: dict[str, int] = {}
    outputs: dict[str, Any] = {}
    for step in range(1, 400):
        for output in engine.llm.llm_engine.step():
            started.setdefault(output.request_id, step)
            if output.finished:
                outputs[output.request_id] = output
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
    assert started["short"] <= 4 + len(long) - 1
    for number, ask in enumerate(long):
        assert started[f"long{number}"] <= (number + 1) * (PATIENCE + 2)
        engine.check(ask, outputs[f"long{number}"])
    assert min(len(outputs[f"decode{number}"].outputs[0].token_ids) for number in range(3)) == 8 * PATIENCE
    assert len({outputs[f"decode{number}"].outputs[0].text for number in range(3)}) == 1
    assert not scheduler_of(engine.llm).turns.since


def test_a_long_prompt_gets_the_next_place(engine):
    """As many requests run as may. Those behind the prompt do not take the places that become free."""
    for number in range(8):
        add(engine, f"decode{number}", TEXT, SamplingParams(max_tokens=20 + 4 * number, ignore_eos=True))
    engine.llm.llm_engine.step()
    add(engine, "long", LONG)
    for number in range(8):
        add(engine, f"short{number}", TEXT)
    order: list[str] = []

    def note():
        for name in (one.request_id.split("-")[0] for one in scheduler_of(engine.llm).running):
            if name not in order:
                order.append(name)

    outputs = step_until(engine.llm, lambda: not engine.llm.llm_engine.has_unfinished_requests(), note)
    assert order.index("long") <= 8 + 2
    engine.check(LONG, outputs["long"])


def test_a_prompt_that_is_cut_ends_alone(engine, monkeypatch):
    all_free = free_blocks(engine.llm)
    scheduler = scheduler_of(engine.llm)
    original = scheduler._try_schedule_encoder_inputs

    def cut(request, num_computed_tokens, *args, **options):
        if request.request_id.startswith("cut"):
            num_computed_tokens = scheduler._one_step(request).start + 1
        return original(request, num_computed_tokens, *args, **options)

    monkeypatch.setattr(scheduler, "_try_schedule_encoder_inputs", cut)
    add(engine, "whole", LONG)
    add(engine, "cut", LONG)
    outputs = finished(engine)
    assert outputs["cut"].outputs[0].finish_reason == "error"
    engine.check(LONG, outputs["whole"])
    assert free_blocks(engine.llm) == all_free


def test_a_seeded_request_whose_prompt_is_cut(engine):
    """The text before the picture is computed in steps of its own, or comes from the cache: the draws are the
    same, and the engine lives on."""
    before = "Some words that stand before the picture and are longer than a step. " * 9
    ask = Ask("seeded", f"{before}<image>\nWhat? ASSISTANT:", (A,))
    seeded = SamplingParams(temperature=1, seed=7, max_tokens=12, ignore_eos=True)
    engine.llm.reset_prefix_cache()
    cut, cached = (
        engine.llm.generate(ask.to_vllm(engine.oracle), seeded, use_tqdm=False)[0] for _ in range(2)
    )
    assert (cut.num_cached_tokens, cached.num_cached_tokens > 0) == (0, True)
    assert cut.outputs[0].token_ids == cached.outputs[0].token_ids


def test_created_cache_tokens_are_tokens_of_the_prompt(engine):
    engine.llm.reset_prefix_cache()
    before = "Some words that stand before the picture and fill a block or two. " * 4
    ask = Ask("billed", f"{before}<image>\nWhat? ASSISTANT:", (A,))
    first, second = (
        engine.llm.generate(ask.to_vllm(engine.oracle), GREEDY, use_tqdm=False)[0] for _ in range(2)
    )
    assert first.num_cached_tokens == 0
    assert first.num_cache_creation_tokens == second.num_cached_tokens > 0
    assert second.num_cache_creation_tokens == 0


def only_gated(engine: Engine) -> None:
    if scheduler_of(engine.llm).withdrawal_policy.gate is None:
        pytest.skip("no gates")


def test_an_id_that_is_used_again_while_its_step_is_in_flight(engine, monkeypatch):
    only_gated(engine)
    all_free, scheduler = free_blocks(engine.llm), scheduler_of(engine.llm)
    update = scheduler.update_from_output
    again: list[str] = []

    def abort_and_add_again(scheduler_output, model_output):
        for request_id in getattr(model_output, EXITS, {}):
            if request_id.startswith("twice") and not again:
                twin = copy.copy(scheduler.requests[request_id])
                twin.status, twin.num_computed_tokens, twin.num_in_flight_tokens = RequestStatus.WAITING, 0, 0
                scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
                scheduler.add_request(twin)
                again.append(request_id)
        return update(scheduler_output, model_output)

    monkeypatch.setattr(scheduler, "update_from_output", abort_and_add_again)
    add(engine, "twice", LONG)
    add(engine, "other", TEXT)
    outputs = finished(engine)
    assert again
    assert outputs["twice"].outputs[0].finish_reason == "error"
    assert len(outputs["other"].outputs[0].token_ids) == GREEDY.max_tokens
    assert free_blocks(engine.llm) == all_free
    assert not scheduler.awaiting_gates
    assert not scheduler.ended_in_flight
    monkeypatch.undo()
    engine.check(LONG, engine.llm.generate(LONG.to_vllm(engine.oracle), GREEDY, use_tqdm=False)[0])


def test_a_decision_that_does_not_come_ends_its_request(engine, monkeypatch):
    only_gated(engine)
    all_free, scheduler = free_blocks(engine.llm), scheduler_of(engine.llm)
    update = scheduler.update_from_output

    def lose(scheduler_output, model_output):
        exits = getattr(model_output, EXITS, {})
        for request_id in [one for one in exits if one.startswith("lost")]:
            del exits[request_id]
        return update(scheduler_output, model_output)

    monkeypatch.setattr(scheduler, "update_from_output", lose)
    add(engine, "lost", LONG)
    add(engine, "told", LATER)
    outputs = finished(engine)
    assert outputs["lost"].outputs[0].finish_reason == "error"
    engine.check(LATER, outputs["told"])
    assert free_blocks(engine.llm) == all_free


def test_beam_search_is_refused_before_it_is_queued(engine):
    params = BeamSearchParams(beam_width=1, max_tokens=4)
    with pytest.raises(ValueError, match="Beam search sends every generated token"):
        engine.llm.beam_search([LONG.to_vllm(engine.oracle)], params)
    assert not scheduler_of(engine.llm).requests
    text = engine.llm.beam_search([TEXT.to_vllm(engine.oracle)], params)[0].sequences[0]
    greedy = engine.llm.generate(TEXT.to_vllm(engine.oracle), GREEDY, use_tqdm=False)[0]
    assert text.tokens[-4:] == greedy.outputs[0].token_ids[:4]
