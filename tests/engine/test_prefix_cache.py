# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Prefix caching: what is served from the cache, beside stock vLLM, and that answers stay what they were."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.request import Request

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import (
    BLOCK_SIZE,
    FILLER,
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
from tests.engine.reference import Reference

SIZES = (7, 31, 64, 99)
LAYER = MODEL.layers // 2
DEEP = SmallLlava(layers=32)
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 96,
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Turn:
    """A request by its token ids, with one `<image>` for every picture."""

    ids: tuple[int, ...]
    embeds: tuple[torch.Tensor, ...] = ()
    salt: str | None = None

    def to_vllm(self) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": list(self.ids)}
        if self.embeds:
            prompt["multi_modal_data"] = {"image": list(self.embeds)}
        if self.salt:
            prompt["cache_salt"] = self.salt
        return prompt


@dataclass
class Served:
    """What came of a turn."""

    turn: Turn
    prompt_ids: Sequence[int]
    answer: tuple[int, ...]
    cached: int

    def assert_right(self, oracle: Reference, align_to: int, layer: int = LAYER) -> None:
        ids = [*self.prompt_ids, *self.answer]
        dropped = oracle.dropped(ids, len(self.prompt_ids), align_to)
        logits = oracle.logits(ids, self.turn.embeds, layer, dropped)
        assert list(self.answer) == logits[len(self.prompt_ids) - 1 : -1].argmax(-1).tolist()

    def and_then(self, tokenizer: Callable[[str], Sequence[int]], question: str) -> Turn:
        """The chat's next turn."""
        return replace(self.turn, ids=(*self.turn.ids, *self.answer, *tokenizer(question)))


def serve(llm: LLM, turn: Turn, params: SamplingParams = GREEDY) -> Served:
    output = llm.generate(turn.to_vllm(), params, use_tqdm=False)[0]
    return Served(turn, output.prompt_token_ids, tuple(output.outputs[0].token_ids), output.num_cached_tokens)


class Setting:
    """A model, its reference, and what stock vLLM makes of a course of requests.

    Attributes:
        course: Requests that begin alike in every way that pictures can, and in an order that lets them.
    """

    def __init__(self, folder: Path, oracle: Reference) -> None:
        self.folder, self.oracle = folder, oracle
        a, b, c = (oracle.embeds(image) for image in (A, B, C))

        def turn(text: str, *embeds: torch.Tensor) -> Turn:
            return Turn(tuple(self.tokenize(text)), embeds)

        shape = "USER: <image>\n{} ASSISTANT:"
        self.course = [
            turn(shape.format("What is this?"), a),
            turn(shape.format("Which colour has it?"), a),
            turn(shape.format("What is this?"), b),
            turn(shape.format("What is this?"), a),
            # Pictures of other sizes.
            *(turn(shape.format(question), a[:size]) for size in SIZES for question in ("What?", "Why?")),
            # Several, and touching ones, of which one is another.
            turn(f"{FILLER}<image> and <image> Which?", a, b),
            turn(f"{FILLER}<image> and <image> Why?", a, c),
            turn(f"{FILLER}<image> and <image> Which?", a, b),
            turn("<image><image> What differs?", a, b),
            turn("<image><image> What differs?", a, c),
            turn("<image><image><image> What differs?", a, c, b),
            turn("<image> What is this?", a),
            # Prompts that end in a picture, after which others go on: at a block's end, and inside one.
            turn("<image>", a[:96]),
            turn("<image> What is this?", a[:96]),
            turn("<image>", a[:96]),
            turn("USER: <image>", b),
            turn("USER: <image> What is this?", b),
            # Text alone, and a picture behind the same text.
            turn(f"USER: {FILLER * 4} ASSISTANT:"),
            turn(f"USER: {FILLER * 4} <image> ASSISTANT:", c),
            turn(f"USER: {FILLER * 4} ASSISTANT:"),
        ]

    def tokenize(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self.oracle.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @functools.cache  # noqa: B019 - it lives as long as the tests of this file
    def in_stock(self, block_size: int) -> list[Served]:
        with running(self.folder, block_size=block_size, **ENGINE) as llm:
            return [serve(llm, turn) for turn in self.course]


@pytest.fixture(scope="module")
def settings(checkpoint, reference) -> Callable[[SmallLlava], Setting]:
    return functools.cache(lambda model: Setting(checkpoint(model), reference(checkpoint(model))))


@pytest.fixture
def setting(settings) -> Setting:
    return settings(MODEL)


@pytest.mark.parametrize(
    "layer", [4, 28, *(pytest.param(k, marks=pytest.mark.slow) for k in (11, 20, 26, 31))]
)
def test_blocks_of_several_pages_serve_as_much_from_the_cache(settings, layer):
    """In groups of several pages a block, questions about a known picture begin inside a block."""
    setting = settings(DEEP)
    with running(setting.folder, {"layer": layer, "align": True}, **ENGINE) as llm:
        served = [serve(llm, turn) for turn in setting.course]
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        # vLLM encodes what one step schedules together, and only pictures of one size.
        alike = [one for one in served if all(len(embeds) == 100 for embeds in one.turn.embeds)]
        prompts = [one.turn.to_vllm() for one in alike]
        again = llm.generate(prompts, params, use_tqdm=False)
        assert llm.reset_prefix_cache()
        together = llm.generate(prompts, params, use_tqdm=False)
        assert free_blocks(llm) == scheduler_of(llm).kv_cache_config.num_blocks - 1
    assert [one.cached for one in served] == [one.cached for one in setting.in_stock(BLOCK_SIZE)]
    for one in served:
        one.assert_right(setting.oracle, BLOCK_SIZE, layer)
    for outputs in (again, together):
        for one, output in zip(alike, outputs, strict=True):
            assert tuple(output.outputs[0].token_ids) == one.answer[:8]


@pytest.mark.parametrize("block_size", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_by_blocks_as_much_is_served_from_the_cache_as_in_stock(setting, block_size):
    stock = setting.in_stock(block_size)
    options = {"block_size": block_size, **ENGINE}
    with running(setting.folder, {"layer": LAYER, "align": True}, **options) as llm:
        served = [serve(llm, turn) for turn in setting.course]
        assert [one.cached for one in served] == [one.cached for one in stock]
        assert sum(one.cached for one in stock) > 1000
        for one in served:
            one.assert_right(setting.oracle, block_size)
        assert_chats(llm, setting, block_size)
        assert_cache_can_be_parted_and_emptied(llm, setting.oracle, setting.course, block_size)
        assert_hits_while_the_first_runs(llm, setting.oracle, setting.course, block_size)


def assert_chats(llm, setting, block_size, layer=LAYER):
    """Each turn finds all that the one before computed: prompt, picture, and answer but its last token."""
    before = serve(llm, setting.course[0])
    for question in (" USER: And this? ASSISTANT:", " USER: Why? ASSISTANT:"):
        now = serve(llm, before.and_then(setting.tokenize, question))
        computed = len(before.prompt_ids) + len(before.answer) - 1
        assert now.cached == computed // block_size * block_size
        now.assert_right(setting.oracle, block_size, layer)
        before = now


def assert_cache_can_be_parted_and_emptied(llm, oracle, course, block_size):
    salted, others = replace(course[0], salt="one"), replace(course[0], salt="two")
    cached = []
    for turn in (salted, others, salted, others):
        served = serve(llm, turn)
        served.assert_right(oracle, block_size)
        cached.append(served.cached)
    assert cached[:2] == [0, 0]
    assert cached[2] == cached[3] > 0
    assert llm.reset_prefix_cache()
    emptied = serve(llm, salted)
    assert emptied.cached == 0
    emptied.assert_right(oracle, block_size)


def assert_hits_while_the_first_runs(llm, oracle, course, block_size):
    assert llm.reset_prefix_cache()
    engine, all_free = llm.llm_engine, free_blocks(llm)
    engine.add_request("first", course[0].to_vllm(), GREEDY)
    scheduler = scheduler_of(llm)
    outputs = step_until(llm, lambda: any(r.num_output_tokens > 1 for r in scheduler.running))
    for number in range(3):
        engine.add_request(str(number), course[number % 2].to_vllm(), GREEDY)
    outputs |= step_until(llm, lambda: not engine.has_unfinished_requests())
    assert len(outputs) == 4
    for name, output in outputs.items():
        turn = course[0] if name == "first" else course[int(name) % 2]
        ids = tuple(output.outputs[0].token_ids)
        Served(turn, output.prompt_token_ids, ids, 0).assert_right(oracle, block_size)
        if name != "first":
            assert output.num_cached_tokens >= 100 // block_size * block_size
    assert free_blocks(llm) == all_free


@pytest.mark.parametrize(
    ("model", "layer"),
    [(MODEL, LAYER), pytest.param(DEEP, 28, marks=pytest.mark.slow)],
    ids=["a page", "pages"],
)
def test_by_tokens_as_much_is_served_from_the_cache_as_in_stock(settings, model, layer):
    setting = settings(model)
    with running(setting.folder, {"layer": layer, "align": False}, **ENGINE) as llm:
        served = [serve(llm, turn) for turn in setting.course]
        again = [serve(llm, turn) for turn in setting.course]
    for one in served + again:
        one.assert_right(setting.oracle, 1, layer)
    assert [one.cached for one in served] == [one.cached for one in setting.in_stock(BLOCK_SIZE)]


@pytest.mark.parametrize(
    ("model", "layer", "num_blocks"), [(MODEL, LAYER, 24), (DEEP, 28, 16)], ids=["a page", "pages"]
)
@pytest.mark.parametrize("align", [True, False])
def test_a_small_cache_evicts_and_preempts(settings, align, model, layer, num_blocks):
    setting = settings(model)
    options = ENGINE | {"num_gpu_blocks_override": num_blocks, "max_model_len": 320}
    long = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    # vLLM encodes what one step schedules together, and only pictures of one size.
    turns = [
        turn for turn in setting.course if len(turn.embeds) < 3 and all(len(e) == 100 for e in turn.embeds)
    ] * 2
    preempted: set[str] = set()
    with running(setting.folder, {"layer": layer, "align": align}, **options) as llm:
        all_free, scheduler = free_blocks(llm), scheduler_of(llm)
        for number, turn in enumerate(turns):
            llm.llm_engine.add_request(str(number), turn.to_vllm(), long)

        def note():
            preempted.update(r.request_id for r in scheduler.running if r.num_preemptions)

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note)
        assert free_blocks(llm) == all_free
    assert len(preempted) > 2, "the pool was not small enough"
    assert sum(output.num_cached_tokens for output in outputs.values()) > 0
    for number, turn in enumerate(turns):
        output = outputs[str(number)]
        ids = tuple(output.outputs[0].token_ids)
        align_to = BLOCK_SIZE if align else 1
        Served(turn, output.prompt_token_ids, ids, 0).assert_right(setting.oracle, align_to, layer)


def test_a_request_whose_cached_picture_was_evicted_resumes(setting):
    """Stock vLLM 0.32.0 ends here: its worker never got the pixels that the cache covered."""
    options = ENGINE | {"num_gpu_blocks_override": 32, "max_model_len": 480}
    long = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    picture = Ask("picture", "<image>" + FILLER, (A,))
    text = Ask("text", "USER: " + FILLER * 2 + "ASSISTANT:")
    oracle = setting.oracle
    with running(setting.folder, {"layer": LAYER}, **options) as llm:
        engine, scheduler = llm.llm_engine, scheduler_of(llm)
        (first,) = llm.generate(picture.to_vllm(oracle), long, use_tqdm=False)
        # Another picture takes the only place in the encoder's cache.
        llm.generate(replace(picture, images=(B,)).to_vllm(oracle), GREEDY, use_tqdm=False)
        # The text comes first, so the picture is what is preempted when the text has grown over the pool.
        engine.add_request("text", text.to_vllm(oracle), SamplingParams(max_tokens=400, ignore_eos=True))
        engine.step()
        engine.add_request("picture", picture.to_vllm(oracle), long)
        encoded = scheduler.encoder_cache_manager.cached
        encoded_before = set(encoded)
        again: list[Request] = []

        def note():
            again.extend(r for r in scheduler.running if r.mm_features and r.num_preemptions)

        outputs = step_until(llm, lambda: not engine.has_unfinished_requests(), note)
    assert outputs["picture"].num_cached_tokens == 128
    assert again, "it was not preempted"
    assert again[0].mm_features[0].identifier in set(encoded) - encoded_before
    assert outputs["picture"].outputs[0].token_ids == first.outputs[0].token_ids
