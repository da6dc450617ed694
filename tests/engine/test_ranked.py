# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Schedules that rank visual tokens, against the reference that ranks by attention written out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from benchmarks.server import serving
from benchmarks.small_llava import SmallLlava
from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    MODEL,
    SHAPES,
    A,
    Ask,
    B,
    free_blocks,
    held_blocks,
    logprobs_of,
    picture,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.reference import Reference
from vllm_vtw.config import ADMISSION
from vllm_vtw.policy import Policy, Stage

Schedule = Mapping[int, float]
SCHEDULES: dict[str, Schedule] = {
    "two stages": {2: 0.5},
    "none in the end": {1: 0.7, 4: 0.0},
    "four stages": {2: 0.9, 4: 0.31, 6: 0.1},
    "twice the same": {1: 0.5, 3: 0.5, 5: 0.25, 7: 0.0},
    # Some blocks of stages 0 and 1 hold three pages.
    "pages": {1: 0.6, 5: 0.05},
}


def policy(
    schedule: Schedule, model: SmallLlava = MODEL, ranking: str = "last-token-attention"
) -> dict[str, Any]:
    """Options of an engine under a schedule."""
    shape = {"model_type": model.model_type, "num_hidden_layers": model.layers, "hidden_size": model.hidden}
    stages = tuple(Stage(layer, keep) for layer, keep in schedule.items())
    return Policy(stages, ranked_by=ranking).to_json(shape)


def written(folder: Path, schedule: Schedule, model: SmallLlava = MODEL) -> dict[str, Any]:
    file = folder / "policy.json"
    file.write_text(json.dumps(policy(schedule, model)))
    return {"policy": str(file)}


def assert_ranked(
    oracle: Reference, ask: Ask, output: Any, schedule: Schedule, ranking: str = "last-token-attention"
) -> None:
    """The answer is the reference's greedy one, token for token."""
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    embeds = [oracle.embeds(image) for image in ask.images]
    logits = oracle.ranked_logits([*prompt, *answer], embeds, schedule, len(prompt), ranking)
    expected = logits[:-1].argmax(-1).tolist()
    wrong = [at for at, token in enumerate(answer) if token != expected[at]]
    assert not wrong, f"{ask.name}: token {wrong[0]} is {answer[wrong[0]]}, not {expected[wrong[0]]}"


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_request_shape(checkpoint, reference, tmp_path, schedule):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    # A step takes the longest of them, and little else.
    with running(folder, written(tmp_path, schedule), max_num_batched_tokens=320) as llm:
        all_free = free_blocks(llm)
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert free_blocks(llm) == all_free
    for ask, batched, single in zip(SHAPES, together, alone, strict=True):
        assert len(batched.outputs[0].token_ids) == GREEDY.max_tokens
        assert batched.outputs[0].token_ids == single.outputs[0].token_ids, ask.name
        assert_ranked(oracle, ask, batched, schedule)


@pytest.mark.parametrize("ranking", ["key-norm", "variation"])
@pytest.mark.parametrize(
    "schedule", [SCHEDULES["four stages"], pytest.param(SCHEDULES["pages"], marks=pytest.mark.slow)]
)
def test_other_rankings_by_question(checkpoint, reference, schedule, ranking):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    # The text before an image may be in the cache.
    options = {"max_num_batched_tokens": 320, "enable_prefix_caching": True}
    with running(folder, {"policy": policy(schedule, MODEL, ranking)}, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            for ask, output in zip(SHAPES, outputs, strict=True):
                assert_ranked(oracle, ask, output, schedule, ranking)


def test_the_oracle_tells_schedules_apart(checkpoint, reference):
    oracle = reference(checkpoint(MODEL))
    ask = next(ask for ask in SHAPES if ask.name == "several apart")
    text = ask.prompt.replace("<image>", "<image>" * MODEL.image_side**2)
    prompt = oracle.processor.tokenizer(text)["input_ids"]
    embeds = [oracle.embeds(image) for image in ask.images]

    def last(schedule: Schedule):
        return oracle.ranked_logits(prompt, embeds, schedule, len(prompt))[-1]

    full = oracle.logits(prompt, embeds, MODEL.layers, [False] * len(prompt))[-1]
    dropped = oracle.logits(prompt, embeds, 4, oracle.dropped(prompt, len(prompt), 1))[-1]
    assert last({}).allclose(full, atol=1e-4)
    assert last({4: 0.0}).allclose(dropped, atol=1e-4)
    different = [
        last(schedule) for schedule in ({}, {4: 0.0}, {4: 0.5}, {3: 0.5}, {4: 0.6}, {4: 0.5, 6: 0.2})
    ]
    different += [
        oracle.ranked_logits(prompt, embeds, {4: 0.5}, len(prompt), ranking)[-1]
        for ranking in ("key-norm", "variation")
    ]
    for number, one in enumerate(different):
        assert not any(one.allclose(other, atol=1e-3) for other in different[:number])


def test_every_stage_holds_what_was_promised_after_every_step(checkpoint, reference, tmp_path):
    schedule = SCHEDULES["four stages"]
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    seen = set()
    with running(folder, written(tmp_path, schedule), max_num_batched_tokens=320) as llm:
        for number, ask in enumerate(SHAPES):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
        keeps = {manager.kv_cache_spec.stage - 1: manager for manager in stage_managers(llm)}.keys()
        assert keeps == {0, 1, 2}

        def check():
            held = held_blocks(llm)
            ids = [block for groups in held.values() for group in groups for block in group]
            assert len(ids) == len(set(ids)), "a block has two owners"
            for request in scheduler_of(llm).running:
                prompt, computed = request.num_prompt_tokens, request.num_computed_tokens
                visual = sum(oracle.dropped(request.prompt_token_ids, prompt, 1))
                first = request.prompt_token_ids.index(oracle.image_token) if visual else prompt
                assert computed <= first or computed >= prompt, "a prompt was cut where it ranks"
                left = 0 if computed < prompt else visual
                expected = [computed] + [
                    computed - left + -(-left * tenths // 100) for tenths in (90, 31, 10)
                ]
                stages = [spec_stage(group) for group in scheduler_of(llm).kv_cache_config.kv_cache_groups]
                assert [len(group) for group in held[request.request_id]] == [
                    -(-expected[stage] // BLOCK_SIZE) for stage in stages
                ]
                seen.add((request.request_id, computed < prompt))

        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), check)
        assert not held_blocks(llm)
        for number, ask in enumerate(SHAPES):
            llm.llm_engine.add_request(f"aborted {number}", ask.to_vllm(oracle), GREEDY)
        llm.llm_engine.step()
        assert held_blocks(llm)
        llm.llm_engine.abort_request([f"aborted {number}" for number in range(len(SHAPES))])
        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())
        assert not held_blocks(llm)
    assert len({request for request, prefilling in seen if not prefilling}) == len(SHAPES)


def stage_managers(llm) -> list:
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if hasattr(manager.kv_cache_spec, "stage")]


def spec_stage(group) -> int:
    return getattr(group.kv_cache_spec, "stage", 0)


def test_preempted_requests_resume_with_the_same_answers(checkpoint, reference, tmp_path):
    """The prompt's last token ranks again, not the last that was generated."""
    schedule = SCHEDULES["none in the end"]
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asks = [ask for ask in SHAPES if ask.name != "several apart"]
    options = {"max_num_batched_tokens": 320, "num_gpu_blocks_override": 64, "max_model_len": 320}
    resumed: set[str] = set()
    with running(folder, written(tmp_path, schedule), **options) as llm:
        all_free = free_blocks(llm)
        long = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
        for number, ask in enumerate(asks):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), long)

        def note_resumed():
            for request in scheduler_of(llm).running:
                if request.num_preemptions and request.num_output_tokens:
                    resumed.add(request.request_id)

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note_resumed)
        assert free_blocks(llm) == all_free
    assert len(resumed) >= 2, "the pool was not small enough"
    for number, ask in enumerate(asks):
        assert_ranked(oracle, ask, outputs[str(number)], schedule)


def test_what_is_cached_or_computed_before_the_picture_counts(checkpoint, reference, tmp_path):
    """Other questions share the text before the first picture, in blocks, and nothing behind it."""
    schedule = SCHEDULES["four stages"]
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    before = "Some words that stand before the picture and are longer than a step. " * 6
    asks = [
        Ask(f"{n}", f"{before}<image>\n{what} ASSISTANT:", (A,)) for n, what in enumerate(("Who?", "Where?"))
    ]
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 128}
    with running(folder, written(tmp_path, schedule), **options) as llm:
        outputs = [llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0] for ask in (*asks, asks[0])]
        two = SamplingParams(n=2, temperature=1, max_tokens=GREEDY.max_tokens, ignore_eos=True, logprobs=0)
        pair = llm.generate(asks[0].to_vllm(oracle), two, use_tqdm=False)[0].outputs
    assert pair[0].token_ids != pair[1].token_ids
    prompt, embeds = outputs[0].prompt_token_ids, [oracle.embeds(A)]
    for one in pair:
        logits = oracle.ranked_logits([*prompt, *one.token_ids], embeds, schedule, len(prompt))[:-1]
        expected = logprobs_of(logits)[range(len(one.token_ids)), one.token_ids].tolist()
        assert [next(iter(step.values())).logprob for step in one.logprobs] == pytest.approx(
            expected, abs=1e-4
        )
    first = outputs[0].prompt_token_ids.index(oracle.image_token)
    assert first > 128
    assert [output.num_cached_tokens for output in outputs] == [0, *[first // BLOCK_SIZE * BLOCK_SIZE] * 2]
    for ask, output in zip((*asks, asks[0]), outputs, strict=True):
        assert_ranked(oracle, ask, output, schedule)


def test_a_prompt_that_fits_no_step_is_refused(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    fits = next(ask for ask in SHAPES if ask.name == "one in the middle")
    too_long = next(ask for ask in SHAPES if ask.name == "several apart")
    with running(folder, written(tmp_path, SCHEDULES["two stages"]), max_num_batched_tokens=128) as llm:
        with pytest.raises(
            VLLMValidationError,
            match=r"has \d+ tokens from its first image on.*raise --max-num-batched-tokens",
        ):
            llm.generate(too_long.to_vllm(oracle), GREEDY, use_tqdm=False)
        # Its pictures are among those of the one that was refused.
        output = llm.generate(fits.to_vllm(oracle), GREEDY, use_tqdm=False)[0]
    assert_ranked(oracle, fits, output, SCHEDULES["two stages"])


@pytest.mark.slow
def test_a_server_answers_400_and_lives_on(checkpoint, tmp_path):
    from openai import BadRequestError, OpenAI

    from tests.engine.test_server import OPTIONS, chat

    vtw = json.dumps({"vtw": written(tmp_path, SCHEDULES["four stages"])})
    options = [*OPTIONS, "--max-num-batched-tokens=160", f"--additional-config={vtw}"]
    with serving(checkpoint(MODEL), *options) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        assert chat(client, A).choices[0].token_ids
        with pytest.raises(BadRequestError, match="raise --max-num-batched-tokens to 2"):
            chat(client, B, A)
        with pytest.raises(BadRequestError, match="Beam search sends every generated token"):
            chat(client, A, extra_body={"use_beam_search": True, "n": 1})
        assert chat(client, B).choices[0].token_ids
        assert "withdrawing a request's visual tokens by the ranking 'last-token-attention': " in server.log()


def test_prompts_that_wait_do_not_hold_each_others_pictures_back(checkpoint, reference, tmp_path):
    """Each of two has a picture in the encoder's cache, which has no room for another beside them."""
    schedule = SCHEDULES["two stages"]
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    pictures = [picture(10 + number) for number in range(4)]
    asks = [
        Ask("first", "USER: <image><image>\nWhat differs? ASSISTANT:", (pictures[0], pictures[1])),
        Ask("second", "USER: <image><image>\nWhat differs? ASSISTANT:", (pictures[2], pictures[3])),
    ]
    seen = [Ask("seen", "USER: <image>\nWhat? ASSISTANT:", (pictures[number],)) for number in (0, 2)]
    busy = Ask("busy", "USER: " + "A long story about nothing at all. " * 8 + "ASSISTANT:")
    with running(folder, written(tmp_path, schedule), max_num_batched_tokens=260) as llm:
        assert scheduler_of(llm).encoder_cache_manager.cache_size == 260
        for ask in seen:
            llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)
        for number, ask in enumerate((busy, *asks)):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
        steps = 0

        def count():
            nonlocal steps
            steps += 1
            assert steps < 200, "nothing goes on"

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), count)
    for number, ask in enumerate((busy, *asks)):
        assert_ranked(oracle, ask, outputs[str(number)], schedule)


def test_what_did_not_come_through_the_processor_ends_with_an_error(
    checkpoint, reference, tmp_path, monkeypatch
):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    too_long = next(ask for ask in SHAPES if ask.name == "several apart")
    with running(folder, written(tmp_path, SCHEDULES["two stages"]), max_num_batched_tokens=128) as llm:
        admission = replace(getattr(llm.model_config, ADMISSION), max_step_tokens=1 << 20)
        monkeypatch.setattr(llm.model_config, ADMISSION, admission)
        output = llm.generate(too_long.to_vllm(oracle), GREEDY, use_tqdm=False)[0]
        assert output.outputs[0].finish_reason == "error"
        assert not held_blocks(llm)
        fits = llm.generate(SHAPES[1].to_vllm(oracle), GREEDY, use_tqdm=False)[0]
    assert_ranked(oracle, SHAPES[1], fits, SCHEDULES["two stages"])
