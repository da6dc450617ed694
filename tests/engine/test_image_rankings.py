# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stages that keep some of each image's tokens, by rankings that go by the image alone."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

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
    running,
    scheduler_of,
    step_until,
)
from tests.engine.image_orders import dithered, diverse, drawn
from tests.engine.reference import Reference
from vllm_vtw.kv.scheduler import VTWScheduler
from vllm_vtw.rankings.diversity import Diversity

slow = pytest.mark.slow
Schedule = Mapping[int, float]
SCHEDULES: list[Schedule] = [
    {0: 0.25},
    {0: 0.5, 4: 0.0},
    {2: 0.5, 5: 0.1},
    {0: 0.93, 1: 0.4, 6: 0.05},
    # Some chunks of an image have none of the tokens that stay.
    {0: 0.01},
]
PER_IMAGE = MODEL.image_side**2


def policy(schedule: Schedule, ranking: str, model: SmallLlava = MODEL) -> dict[str, Any]:
    """Options of an engine under a schedule."""
    shape = {"model_type": model.model_type, "num_hidden_layers": model.layers, "hidden_size": model.hidden}
    stages = [{"layer": layer, "keep": keep} for layer, keep in schedule.items()]
    content = {"format": "vllm-vtw-policy/1", "model": shape, "stages": stages, "ranking": ranking}
    return {"policy": content}


@pytest.fixture
def hashes(monkeypatch) -> list[list[str]]:
    """vLLM's hashes of the images of every request, in the order in which they come."""
    seen: list[list[str]] = []
    original = VTWScheduler.add_request

    def add_request(self, request):
        seen.append([feature.mm_hash for feature in request.mm_features])
        original(self, request)

    monkeypatch.setattr(VTWScheduler, "add_request", add_request)
    return seen


def leaving(
    oracle: Reference, ask: Ask, prompt: list[int], schedule: Schedule, ranking: str, hashes: list[str]
) -> dict[int, set[int]]:
    """By layer: the positions that leave there."""
    stay = {len(prompt) - 1}
    visual = [position for position, token in enumerate(prompt) if token == oracle.image_token]
    images = [visual[start : start + PER_IMAGE] for start in range(0, len(visual), PER_IMAGE)]
    if ranking == "uniform":
        orders = [dithered(MODEL.image_side)] * len(images)
    elif ranking == "random":
        orders = [drawn(PER_IMAGE, image_hash) for image_hash in hashes]
    else:
        orders = [diverse(oracle.embeds(image)) for image in ask.images]
        # The first token of an image that follows no text.
        stay |= {image[0] for image in images if image[0] == 0 or image[0] - 1 in visual}
    found: dict[int, set[int]] = {}
    gone: set[int] = set()
    for layer, keep in schedule.items():
        kept = ceil(Fraction(str(keep)) * PER_IMAGE)
        before = set(gone)
        for positions, order in zip(images, orders, strict=True):
            gone |= {positions[token] for token in order[kept:]} - stay
        found[layer] = gone - before
    return found


def assert_selected(
    oracle: Reference,
    ask: Ask,
    output: Any,
    schedule: Schedule,
    ranking: str,
    hashes: list[str],
) -> None:
    """The answer is the reference's greedy one, token for token."""
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    embeds = [oracle.embeds(image) for image in ask.images]
    left = leaving(oracle, ask, prompt, schedule, ranking, hashes)
    logits = oracle.selected_logits([*prompt, *answer], embeds, left)
    assert logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer, ask.name


@pytest.mark.parametrize(
    ("schedule", "ranking"),
    [
        (SCHEDULES[0], "uniform"),
        *(pytest.param(schedule, "uniform", marks=slow) for schedule in SCHEDULES[1:]),
        (SCHEDULES[1], "random"),
        *(pytest.param(schedule, "random", marks=slow) for schedule in (SCHEDULES[0], *SCHEDULES[2:])),
        (SCHEDULES[2], "diversity"),
        *(pytest.param(schedule, "diversity", marks=slow) for schedule in (*SCHEDULES[:2], *SCHEDULES[3:])),
    ],
)
def test_every_request_shape(checkpoint, reference, hashes, schedule, ranking):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    # Prompts are computed in chunks that end inside images.
    with running(folder, policy(schedule, ranking), max_num_batched_tokens=72, max_num_seqs=8) as llm:
        all_free = free_blocks(llm)
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert free_blocks(llm) == all_free
    assert hashes[: len(SHAPES)] == hashes[len(SHAPES) :]
    for ask, batched, single, of_ask in zip(SHAPES, together, alone, hashes, strict=False):
        assert len(batched.outputs[0].token_ids) == GREEDY.max_tokens
        assert batched.outputs[0].token_ids == single.outputs[0].token_ids, ask.name
        assert_selected(oracle, ask, batched, schedule, ranking, of_ask)


@pytest.mark.parametrize("ranking", ["random", "diversity"])
def test_blocks_hold_what_stays(checkpoint, reference, hashes, ranking):
    folder, schedule = checkpoint(MODEL), {0: 0.5, 4: 0.1}
    oracle = reference(folder)
    ask = next(ask for ask in SHAPES if ask.name == "several apart")
    with running(folder, policy(schedule, ranking), max_num_batched_tokens=72) as llm:
        llm.llm_engine.add_request("request", ask.to_vllm(oracle), GREEDY)
        (request,) = scheduler_of(llm).requests.values()
        prompt = list(request.prompt_token_ids)
        left = leaving(oracle, ask, prompt, schedule, ranking, hashes[0])
        seen = []

        def check() -> None:
            computed = range(request.num_computed_tokens)
            for manager, (blocks,) in zip(
                scheduler_of(llm).kv_cache_manager.stage_managers,
                zip(*held_blocks(llm).values(), strict=True) if held_blocks(llm) else (),
                strict=False,
            ):
                gone = left[0] if manager.stage == 1 else left[0] | left[4]
                tokens = sum(position not in gone for position in computed)
                assert len(blocks) == -(-tokens // (BLOCK_SIZE * manager.pages))
                seen.append((manager.stage, len(computed)))

        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), check)
    assert {stage for stage, _ in seen} == {1, 2}, "no layer holds all tokens"
    assert any(tokens < len(prompt) for _, tokens in seen)


def test_what_is_not_withdrawn_is_answered_as_in_stock(checkpoint, reference):
    folder = checkpoint(MODEL)
    prompts = [ask.to_vllm(reference(folder)) for ask in SHAPES]
    params = GREEDY.clone()
    params.extra_args = {"vtw_layer": MODEL.layers}
    answers = []
    for vtw, asked in ((None, GREEDY), (policy({0: 0.25, 3: 0.0}, "uniform"), params)):
        with running(folder, vtw, max_num_batched_tokens=72, max_num_seqs=8) as llm:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("schedule", "ranking"),
    [
        ({0: 0.5, 4: 0.25}, "uniform"),
        *(pytest.param(s, "random", marks=slow) for s in ({2: 0.5}, {0: 0.01})),
        ({0: 0.5, 4: 0.25}, "diversity"),
    ],
)
def test_the_prefix_cache_changes_no_answer(checkpoint, reference, hashes, schedule, ranking):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    full = GREEDY.clone()
    full.extra_args = {"vtw_layer": MODEL.layers}
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 72, "max_num_seqs": 4}
    cached = []
    with running(folder, policy(schedule, ranking), **options) as llm:
        for params in (GREEDY, full, GREEDY, full):
            outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], params, use_tqdm=False)
            for ask, output, of_ask in zip(SHAPES, outputs, hashes, strict=False):
                asked = schedule if params is GREEDY else {}
                assert_selected(oracle, ask, output, asked, ranking, of_ask)
            cached.append([output.num_cached_tokens for output in outputs])
    assert cached[2] == cached[3]
    assert sum(cached[2]) > 0.7 * sum(len(output.prompt_token_ids) for output in outputs)


@pytest.mark.parametrize(
    ("ranking", "caching"),
    [("diversity", True), *(pytest.param("uniform", caching, marks=slow) for caching in (False, True))],
)
def test_every_request_may_have_another_share(checkpoint, reference, hashes, ranking, caching):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    vtw = policy({0: 0.5, 5: 0.0}, ranking)
    vtw["policy"]["keeps"] = [0.1, 0.8]
    options = {"enable_prefix_caching": caching, "max_num_batched_tokens": 72, "max_num_seqs": 8}
    with running(folder, vtw, **options) as llm:
        for shift in range(4):
            keeps = [(0.1, 0.5, 0.8, 1, None)[(at + shift) % 5] for at in range(len(SHAPES))]
            prompts = [ask.to_vllm(oracle) for ask in SHAPES]
            outputs = llm.generate(prompts, [keeping(keep) for keep in keeps], use_tqdm=False)
            for ask, output, of_ask, keep in zip(SHAPES, outputs, hashes, keeps, strict=False):
                schedule = {0: keep or 0.5, 5: 0.0}
                assert_selected(oracle, ask, output, schedule, ranking, of_ask)
        again = llm.generate(prompts, [keeping(keep) for keep in keeps], use_tqdm=False)
        assert [one.outputs[0].token_ids for one in again] == [one.outputs[0].token_ids for one in outputs]
        with pytest.raises(
            VLLMValidationError, match=r"'vtw_keep' = 0.3: this server offers 0.1, 0.5, 0.8, 1"
        ):
            llm.generate(prompts[1], keeping(0.3), use_tqdm=False)
    if caching:
        cached = sum(output.num_cached_tokens for output in again)
        assert cached > 0.7 * sum(len(output.prompt_token_ids) for output in again)


def keeping(keep: float | None) -> SamplingParams:
    params = GREEDY.clone()
    params.extra_args = None if keep is None else {"vtw_keep": keep}
    return params


@pytest.mark.parametrize("caching", [True, pytest.param(False, marks=slow)])
def test_preempted_requests_lose_the_same_tokens(checkpoint, reference, hashes, caching):
    folder, schedule = checkpoint(MODEL), {1: 0.5}
    oracle = reference(folder)
    asked = [ask for ask in SHAPES if ask.name != "several apart"] * 2
    few = {"num_gpu_blocks_override": 44, "max_model_len": 320, "max_num_batched_tokens": 96}
    with running(folder, policy(schedule, "diversity"), enable_prefix_caching=caching, **few) as llm:
        for number, ask in enumerate(asked):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
        preempted: set[str] = set()

        def note() -> None:
            preempted.update(one.request_id for one in scheduler_of(llm).running if one.num_preemptions)

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note)
    assert len(preempted) > 2
    for number, (ask, of_ask) in enumerate(zip(asked, hashes, strict=True)):
        assert_selected(oracle, ask, outputs[str(number)], schedule, "diversity", of_ask)


def test_an_image_is_encoded_before_its_tokens_and_ordered_once(checkpoint, reference, monkeypatch):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ordered: list[int] = []
    original = Diversity.order

    def order(self, features, count):
        ordered.append(len(features))
        return original(self, features, count)

    monkeypatch.setattr(Diversity, "order", order)
    with running(folder, policy({0: 0.5}, "diversity"), enable_prefix_caching=True) as llm:
        for number, (text, images) in enumerate(
            [
                ("USER: <image>\nWhat is this? ASSISTANT:", (A,)),
                ("USER: <image>\nWhat is this not? ASSISTANT:", (A,)),
                ("USER: <image> and <image>\nWhat is this not? ASSISTANT:", (A, B)),
            ]
        ):
            llm.llm_engine.add_request(str(number), Ask("", text, images).to_vllm(oracle), GREEDY)
            (request,) = scheduler_of(llm).requests.values()
            computed: list[int] = []
            step_until(
                llm,
                lambda: not llm.llm_engine.has_unfinished_requests(),
                lambda: computed.append(request.num_computed_tokens),  # noqa: B023
            )
            visual = list(request.prompt_token_ids).index(oracle.image_token)
            if number == 0:
                assert computed[:2] == [visual, request.num_prompt_tokens]
            elif number == 1:
                assert computed[0] == request.num_prompt_tokens, "what stays is known"
            assert not scheduler_of(llm).image_orders.awaiting
        assert ordered == [PER_IMAGE] * 2
        counts = scheduler_of(llm).statistics.take()
    leave = PER_IMAGE // 2
    assert counts["requests/0/"] == 3
    assert counts["withdrawn_tokens/1"] == 4 * leave


def test_beam_search(checkpoint, reference):
    """Greedy's tokens, or a refusal where the prompt's last token would no longer be the last one."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    with running(folder, policy({0: 0.5}, "diversity")) as llm:
        for ask in SHAPES:
            if ask.as_embeds:
                continue
            prompt = ask.to_vllm(oracle)
            if ask.prompt.endswith("<image>"):
                with pytest.raises(ValueError, match="Beam search sends every generated token"):
                    llm.beam_search([prompt], params)
                continue
            found = llm.beam_search([prompt], params)[0].sequences[0].tokens[-6:]
            assert found == llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids, ask.name


def test_orders_that_were_forgotten_are_found_again(checkpoint, reference, hashes, monkeypatch):
    """Also where another order comes out: rows are shared only by requests that hold the same tokens."""
    folder, schedule = checkpoint(MODEL), {1: 0.5, 4: 0.25}
    oracle = reference(folder)
    ask = next(ask for ask in SHAPES if ask.name == "several apart")
    original = Diversity.order
    with running(folder, policy(schedule, "diversity"), enable_prefix_caching=True) as llm:
        scheduler = scheduler_of(llm)
        cached = []
        for forgets in (False, False, True):
            if forgets:
                scheduler.image_orders.known.clear()
                monkeypatch.setattr(Diversity, "order", lambda *args: original(*args).flip(0))
            output = llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0]
            cached.append(output.num_cached_tokens)
            if not forgets:
                assert_selected(oracle, ask, output, schedule, "diversity", hashes[-1])
        changed = output.outputs[0].token_ids
        scheduler.kv_cache_manager.reset_prefix_cache()
        assert llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0].outputs[0].token_ids == changed
    visual = list(output.prompt_token_ids).index(oracle.image_token)
    assert cached[0] == 0
    assert cached[1] > 0.8 * len(output.prompt_token_ids)
    assert cached[2] <= visual


def test_an_identifier_of_images_of_two_sizes_is_no_order_of_both(checkpoint, reference, hashes):
    """Clients may name images as they like, and give one name to several."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    with running(folder, policy({0: 0.5}, "diversity")) as llm:
        engine, orders = llm.llm_engine, scheduler_of(llm).image_orders
        for number, ask in enumerate(ask for ask in SHAPES if ask.name in ("text before", "touching")):
            engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
        (first, second) = scheduler_of(llm).requests.values()
        identifier = first.mm_features[0].identifier
        assert identifier == second.mm_features[0].identifier
        # As if another image of this name had come before, and the worker had ordered its tokens.
        orders.known[identifier, PER_IMAGE + 1] = np.arange(PER_IMAGE + 1, dtype=np.int32)
        outputs = step_until(llm, lambda: not engine.has_unfinished_requests())
        assert set(orders.known) >= {(identifier, PER_IMAGE), (identifier, PER_IMAGE + 1)}
    for number, ask in enumerate(ask for ask in SHAPES if ask.name in ("text before", "touching")):
        assert_selected(oracle, ask, outputs[str(number)], {0: 0.5}, "diversity", hashes[number])


def test_touching_images_where_the_encoder_cache_holds_one(checkpoint, reference, hashes, monkeypatch):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [ask for ask in SHAPES if ask.name in ("touching", "nothing but several", "several apart")] * 2
    with running(folder, policy({0: 0.5}, "diversity"), max_num_batched_tokens=72, max_num_seqs=8) as llm:
        manager = scheduler_of(llm).encoder_cache_manager
        manager.num_free_slots = manager.num_freeable_slots = manager.cache_size = PER_IMAGE
        outputs = llm.generate([ask.to_vllm(oracle) for ask in asked], GREEDY, use_tqdm=False)
        assert not scheduler_of(llm).image_orders.awaiting
    for ask, output, of_ask in zip(asked, outputs, hashes, strict=True):
        assert_selected(oracle, ask, output, {0: 0.5}, "diversity", of_ask)


def test_other_weights_make_other_orders(checkpoint, reference, hashes, monkeypatch):
    """vLLM resets the encoder cache before it loads them."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask = next(ask for ask in SHAPES if ask.name == "one in the middle")
    with running(folder, policy({0: 0.5}, "diversity")) as llm:
        orders = scheduler_of(llm).image_orders
        llm.llm_engine.add_request("0", ask.to_vllm(oracle), GREEDY)
        llm.llm_engine.step()
        assert next(iter(orders.known.values())).tolist() == diverse(oracle.embeds(A))[: PER_IMAGE // 2]
        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())
        scheduler_of(llm).reset_encoder_cache()
        assert not orders.known
        # What workers were asked before comes too late.
        orders._asked.add(("image", PER_IMAGE))
        scheduler_of(llm).reset_encoder_cache()
        assert not list(orders.take([("image", PER_IMAGE)], {("image", PER_IMAGE): np.arange(3)}))
        assert not orders.known
        assert not orders._outdated


def test_a_worker_that_sends_no_order_ends_the_request_alone(checkpoint, reference, hashes, monkeypatch):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [ask for ask in SHAPES if ask.name in ("no image", "text before")]
    with running(folder, policy({0: 0.5}, "diversity")) as llm:
        with monkeypatch.context() as patch:
            model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            patch.setattr(model.get_model().vtw_step, "features_of", lambda identifier: None)
            outputs = llm.generate([ask.to_vllm(oracle) for ask in asked], GREEDY, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error"]
        assert free_blocks(llm) == scheduler_of(llm).kv_cache_config.num_blocks - 1
        (output,) = llm.generate(asked[1].to_vllm(oracle), GREEDY, use_tqdm=False)
        assert_selected(oracle, asked[1], output, {0: 0.5}, "diversity", hashes[-1])
