# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of `Retention` against a slow, simple computation, and of the retentions of vLLM's requests."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange

from tests.unit.strategies import ALIGNMENTS, Prompt, prompts
from vllm_vtw.policy import Gate, Policy, Stage
from vllm_vtw.rankings import IMAGE_RANKINGS
from vllm_vtw.retention import (
    EVERYTHING,
    after_exit,
    awaits_gates,
    awaits_image,
    image_key,
    prompt_retention,
    request_retentions,
    visual_spans,
)


@given(prompts(), ALIGNMENTS, st.integers(0, 20))
def test_counts_and_ranks(prompt: Prompt, align_to: int, output_tokens: int):
    retention = prompt.retention(align_to)
    for num_tokens in range(prompt.length + output_tokens + 1):
        assert retention.count(num_tokens) == len(prompt.held(num_tokens, align_to))
    held = prompt.held(prompt.length + output_tokens, align_to)
    assert [retention.count(position) for position in held] == list(range(len(held)))
    assert [retention.position(rank) for rank in range(len(held))] == held


class Counted(Sequence[int]):
    """Numbers, and how often one of them was looked at."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.looks = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        self.looks += 1
        return self.numbers[index]


def test_the_chunks_of_a_long_video_do_not_look_at_all_of_its_frames():
    """A thousand frames of 64 tokens with 8 between them, in chunks of 720 tokens: ten frames each."""
    frames, chunk = 1000, 720
    video: Any = prompt_retention([(72 * n, 72 * n + 64) for n in range(frames)], 72 * frames + 8, align_to=1)
    video._starts, video._stops = starts, stops = Counted(video._starts), Counted(video._stops)
    kept = [video.keep_mask(start, start + chunk).sum() for start in range(0, 72 * frames, chunk)]
    assert kept == [80] * 100
    bisections = 2 * 100 * frames.bit_length()
    assert starts.looks + stops.looks <= 2 * frames + bisections


@given(prompts(), ALIGNMENTS, st.data())
def test_keep_masks(prompt: Prompt, align_to: int, data: st.DataObject):
    stop = data.draw(st.integers(0, prompt.length + 10))
    start = data.draw(st.integers(0, stop))
    held = set(prompt.held(stop, align_to))
    mask = prompt.retention(align_to).keep_mask(start, stop)
    assert mask.tolist() == [position in held for position in range(start, stop)]


@given(prompts(), ALIGNMENTS)
def test_where_all_is_kept(prompt: Prompt, align_to: int):
    retention = prompt.retention(align_to)
    beyond = prompt.length + 5
    assert retention.all_kept_from < prompt.length
    assert retention.num_withdrawn == beyond - len(prompt.held(beyond, align_to))
    assert retention.keep_mask(retention.all_kept_from, beyond).all()


@given(prompts(), ALIGNMENTS, st.lists(st.booleans(), max_size=4))
def test_what_goes_on_from_a_prompt_shares_its_start(prompt: Prompt, align_to: int, pieces: list[bool]):
    """Up to `shareable` tokens are retained in the same way, whatever text or images follow the prompt."""
    spans, length = list(prompt.spans), prompt.length
    for is_image in pieces:
        if is_image:
            spans.append((length, length + 9))
        length += 9
    longer = Prompt(length, tuple(spans))
    # Visual tokens that follow may complete the prompt's last block, which is then withdrawn.
    shared = min(prompt.retention(align_to).shareable, prompt.length // align_to * align_to)
    for num_tokens in range(shared + 1):
        assert longer.held(num_tokens, align_to) == prompt.held(num_tokens, align_to)


@given(prompts(), ALIGNMENTS)
def test_all_is_shareable_where_keeping_the_last_token_changes_nothing(prompt: Prompt, align_to: int):
    goes_on = Prompt(prompt.length + 1, prompt.spans)
    same = goes_on.held(prompt.length, align_to) == prompt.held(prompt.length, align_to)
    assert (prompt.retention(align_to).shareable >= prompt.length) == same


def test_the_last_prompt_token_stays():
    assert Prompt(8, ((0, 8),)).retention(1).keep_mask(0, 8).tolist() == [False] * 7 + [True]
    # If whole blocks are withdrawn, the last token's block stays.
    assert Prompt(8, ((0, 8),)).retention(4).keep_mask(0, 8).tolist() == [False] * 4 + [True] * 4


def test_a_block_across_two_touching_images_leaves():
    assert Prompt(13, ((0, 6), (6, 12))).retention(4).num_withdrawn == 12


def feature(modality: str, offset: int, length: int, is_embed: list[bool] | None = None) -> SimpleNamespace:
    mask = None if is_embed is None else torch.tensor(is_embed)
    return SimpleNamespace(
        modality=modality,
        mm_position=PlaceholderRange(offset, length, mask),
        mm_hash=f"image at {offset}",
        identifier=f"features at {offset}",
    )


def test_only_images_and_videos_are_visual():
    features = [
        feature("audio", 0, 5),
        feature("image", 10, 4, [False, True, True, False]),
        feature("video", 20, 5, [True, False, True, True, False]),
    ]
    assert visual_spans(features, bridge=0) == [(11, 13), (20, 21), (22, 24)]


def test_short_gaps_within_an_image_are_bridged():
    """Gaps between two images, longer ones, and those of a video are not."""
    rows = [True, True, False, True, False, False, True]
    features = [feature("image", 10, 7, rows), feature("image", 17, 2), feature("video", 30, 7, rows)]
    assert visual_spans(features, bridge=1) == [(10, 14), (16, 17), (17, 19), (30, 32), (33, 34), (36, 37)]
    assert visual_spans(features, bridge=2) == [(10, 17), (17, 19), (30, 32), (33, 34), (36, 37)]


def test_every_stage_past_the_first_has_a_retention():
    features = [feature("image", 2, 4)]
    assert request_retentions(Policy(()), features, 10, 1, bridge=0) == ()
    (only,) = request_retentions(Policy.withdraw_at(4, 8), features, 10, 1, bridge=0)
    assert only.keep_mask(0, 10).tolist() == [True] * 2 + [False] * 4 + [True] * 4


@given(prompts(), st.integers(1, 4), st.data())
def test_gated_stages_hold_everything_until_gates_decide(prompt: Prompt, stages: int, data: st.DataObject):
    gate = Gate("gates.safetensors", "", (0.0,) * stages)
    policy = Policy(tuple(Stage(layer, 0.0) for layer in range(1, stages + 1)), gate)
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    before = request_retentions(policy, features, prompt.length, 16, bridge=0)
    for length in (prompt.length, prompt.length + 5):
        assert [retention.count(length) for retention in before] == [length] * stages
    held = prompt.held(prompt.length, 1)
    visual = {position for span in prompt.spans for position in range(*span)}
    assert awaits_gates(before) == (len(held) < prompt.length and not {*range(prompt.length)[-2:]} & visual)
    if not awaits_gates(before):
        return
    exit_stage = data.draw(st.none() | st.integers(1, stages))
    retentions = after_exit(before, exit_stage)
    assert not awaits_gates(retentions)
    for stage, retention in enumerate(retentions, 1):
        kept = held if exit_stage is not None and stage >= exit_stage else list(range(prompt.length))
        assert np.flatnonzero(retention.keep_mask(0, prompt.length)).tolist() == kept
        assert retention.count(prompt.length + 7) == len(kept) + 7
        # Only the text before the first image is independent of the question.
        assert retention.shareable == prompt.spans[0][0]


@given(prompts(), st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.99]), min_size=1, max_size=3))
def test_ranked_stages_promise_a_number(prompt: Prompt, keeps: list[float]):
    keeps.sort(reverse=True)
    policy = Policy(tuple(Stage(layer, keep) for layer, keep in enumerate([0.995, *keeps], 1)))
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    retentions = request_retentions(policy, features, prompt.length, 16, bridge=0)
    leaving = prompt.length - len(prompt.held(prompt.length, 1))
    before = 0
    for stage, retention in zip(policy.stages, retentions, strict=True):
        assert retention.num_withdrawn == leaving - stage.kept(leaving) >= before
        before = retention.num_withdrawn
        if not leaving:
            assert retention.one_step is None
            continue
        one_step = retention.one_step
        assert one_step is not None
        assert (one_step.start, one_step.stop) == (prompt.spans[0][0], prompt.length)
        assert sum(stop - start for start, stop in one_step.candidates) == leaving
        # No step ends between the first image and the prompt's end, and no other request shares blocks there.
        assert retention.shareable == one_step.start
        assert retention.count(one_step.start) == one_step.start
        for generated in (0, 7):
            assert retention.count(prompt.length + generated) == prompt.length + generated - before


@given(
    prompts(),
    st.sampled_from(sorted(IMAGE_RANKINGS)),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.99]), min_size=1, max_size=3),
)
def test_rankings_by_image_alone_say_which_tokens_stay(prompt: Prompt, ranking: str, keeps: list[float]):
    keeps.sort(reverse=True)
    policy = Policy(
        tuple(Stage(layer, keep) for layer, keep in enumerate([0.995, *keeps])), ranked_by=ranking
    )
    assert not policy.is_dynamic
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    retentions = request_retentions(policy, features, prompt.length, 16, bridge=0)
    for stage, retention in zip(policy.stages, retentions, strict=True):
        leaving = set()
        for (start, stop), image in zip(prompt.spans, features, strict=True):
            order = IMAGE_RANKINGS[ranking]().order(stop - start, image.mm_hash)
            leaving |= {start + int(token) for token in order[stage.kept(stop - start) :]}
        last = prompt.length - 1
        held = [position for position in range(prompt.length) if position == last or position not in leaving]
        assert np.flatnonzero(retention.keep_mask(0, prompt.length)).tolist() == held
        assert [retention.count(position) for position in held] == list(range(len(held)))
        assert retention.count(prompt.length + 7) == len(held) + 7
        assert retention.one_step is None
        # In a longer prompt, the last token may leave.
        assert (retention.shareable == last) == (last in leaving)
        assert bool(retention.mark_before(prompt.length)) == bool(prompt.spans)
    everything = request_retentions(policy, features, prompt.length, 1, bridge=0, layer=8)
    assert all(retention is EVERYTHING for retention in everything)


BY_FEATURES = Policy((Stage(0, 0.6), Stage(2, 0.25), Stage(5, 0.0)), ranked_by="diversity")


@given(prompts(), st.data())
def test_what_stays_of_an_image_is_told_by_others(prompt: Prompt, data: st.DataObject):
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    orders = {
        image_key(image): np.array(
            data.draw(st.permutations(range(stop - start)))[: BY_FEATURES.most_kept(stop - start)],
            dtype=np.int32,
        )
        for image, (start, stop) in zip(features, prompt.spans, strict=True)
    }
    retentions = request_retentions(BY_FEATURES, features, prompt.length, 1, bridge=0, orders=orders)
    ends = {0, *(stop for _, stop in prompt.spans)}
    stay = {prompt.length - 1, *(start for start, _ in prompt.spans if start in ends)}
    for stage, retention in zip(BY_FEATURES.stages, retentions, strict=True):
        gone = set()
        for (start, stop), image in zip(prompt.spans, features, strict=True):
            kept = orders[image_key(image)][: stage.kept(stop - start)]
            gone |= set(range(start, stop)) - {start + int(token) for token in kept}
        mask = retention.keep_mask(0, prompt.length).tolist()
        assert mask == [position in stay or position not in gone for position in range(prompt.length)]
        assert retention.awaits_from is None


@given(prompts(), st.data())
def test_an_image_is_awaited_before_any_of_its_tokens_leaves(prompt: Prompt, data: st.DataObject):
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    orders = {
        image_key(image): np.arange(BY_FEATURES.most_kept(stop - start), dtype=np.int32)[::-1]
        for image, (start, stop) in zip(features, prompt.spans, strict=True)
    }
    missing = data.draw(st.integers(0, len(features)))
    known = {image_key(image): orders[image_key(image)] for image in features[:missing]}
    whole, part = (
        request_retentions(BY_FEATURES, features, prompt.length, 1, bridge=0, orders=told)
        for told in (orders, known)
    )
    assert awaits_image(part) == (missing < len(features))
    for of_whole, of_part in zip(whole, part, strict=True):
        until = of_part.awaits_from
        if until is None:
            assert of_part.withdrawn == of_whole.withdrawn
            continue
        assert type(until) is int, "numpy's numbers cannot be sent from the engine's process"
        start, stop = prompt.spans[missing]
        assert start <= until <= stop
        assert of_part.shareable < until
        assert (of_part.keep_mask(0, until) == of_whole.keep_mask(0, until)).all()
        assert of_part.count(until) == of_whole.count(until)
        assert of_part.mark_before(until) == of_whole.mark_before(start)
        assert of_part.count(prompt.length) - of_part.count(until) == prompt.length - until
        # A step that encodes the image computes at least one token.
        assert until > 0
        if missing:
            assert until > prompt.spans[missing - 1][1] or until > start


@given(st.lists(st.permutations(range(5)), min_size=2, max_size=2), st.sampled_from([None, 0.25, 0.5]))
def test_rows_are_told_apart_by_what_left(orders: list[list[int]], keep: float | None):
    policy = Policy((Stage(1, 0.5),), ranked_by="diversity", offered_keeps=(0.25, 0.5))
    images = [feature("image", 3, 5)]
    first, second = (
        request_retentions(
            policy,
            images,
            20,
            1,
            0,
            keep=keep,
            orders={("features at 3", 5): np.array(order[:3], dtype=np.int32)},
        )[0]
        for order in orders
    )
    assert first.mark_before(3) == b""
    assert (first.mark_before(4) == second.mark_before(4)) == (orders[0][:3] == orders[1][:3])
    other = request_retentions(
        policy,
        images,
        20,
        1,
        0,
        keep=0.25,
        orders={("features at 3", 5): np.array(orders[0][:3], dtype=np.int32)},
    )[0]
    assert (other.mark_before(9) == first.mark_before(9)) == (keep == 0.25)


@given(prompts(), st.sampled_from(["uniform", "random", "diversity", "last-token-attention"]))
def test_a_request_may_keep_all(prompt: Prompt, ranking: str):
    features = [feature("image", start, stop - start) for start, stop in prompt.spans]
    orders = {
        (f"features at {start}", stop - start): np.arange((stop - start + 1) // 2, dtype=np.int32)
        for start, stop in prompt.spans
    }
    policy = Policy((Stage(1, 0.5),), ranked_by=ranking, offered_keeps=(0.25, 0.5))
    for retention in request_retentions(policy, features, prompt.length, 1, 0, keep=1):
        assert retention is EVERYTHING
    chosen, same = (
        request_retentions(one, features, prompt.length, 1, 0, keep=keep, orders=orders)[0]
        for one, keep in ((policy, 0.25), (Policy((Stage(1, 0.25),), ranked_by=ranking), None))
    )
    assert chosen.withdrawn == same.withdrawn
    policy = Policy((Stage(1, 0.5), Stage(3, 0.0)), ranked_by=ranking, offered_keeps=(0.25, 0.5))
    shallow, deep = request_retentions(policy, features, prompt.length, 1, 0, keep=1, orders=orders)
    assert not shallow.num_withdrawn
    visual = {position for start, stop in prompt.spans for position in range(start, stop)}
    first_of_image = ranking == "diversity" and sum(
        start in {0, *(stop for _, stop in prompt.spans)} and start != prompt.length - 1
        for start, _ in prompt.spans
    )
    assert deep.num_withdrawn == len(visual - {prompt.length - 1}) - first_of_image
