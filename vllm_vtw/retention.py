# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which tokens of a request a stage retains.

No other code answers that question. The scheduler process allocates KV blocks by it, and the worker builds
attention metadata by it.
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vtw.policy import BY_FEATURES, BY_IMAGE, Policy
from vllm_vtw.rankings import IMAGE_RANKINGS

VISUAL = ("image", "video")
Mark = tuple[int, bytes]
"""A position, and what distinguishes rows from there on if other tokens of the same prompt may have left."""
ImageKey = tuple[str, int]
"""An image's identifier in vLLM's encoder cache, and the number of its visual tokens. A client may give
images of different sizes the same identifier."""
Orders = Mapping[ImageKey, npt.NDArray[np.int32]]
"""Those of an image's tokens that may stay, as `FeatureRanking.order` returned them."""
NO_ORDERS: Orders = {}
Span = tuple[int, int]
"""A half-open range of prompt positions, `start <= position < stop`."""


@dataclass(frozen=True)
class OneStepPrefill:
    """The part of a prompt that one step has to compute, because what is withdrawn depends on all of it.

    It reaches from the prompt's first image to the prompt's end. Rankings and gates read the states of text
    after the images, and the visual tokens have to be there still when they do.

    Attributes:
        start: Position where the prompt's first image begins.
        stop: Number of tokens of the prompt.
        candidates: Spans of the visual tokens that may be withdrawn, ascending.
        text_start: Position where the text after the last image begins.
        gated: Whether gates decide at which layer all candidates leave. If not, the candidates are ranked.
    """

    start: int
    stop: int
    candidates: tuple[Span, ...]
    text_start: int
    gated: bool

    def is_whole_in(self, start: int, stop: int) -> bool:
        """Whether a step that computes the positions from `start` to `stop - 1` computes all of this part."""
        return start <= self.start and self.stop <= stop

    @property
    def visual_tokens(self) -> int:
        """The number of candidates."""
        return sum(stop - start for start, stop in self.candidates)

    @property
    def text_tokens(self) -> int:
        """The number of tokens after the last image."""
        return self.stop - self.text_start


class Retention:
    """Which tokens of one request, prompt and output alike, one stage retains.

    Tokens at `withdrawn` positions never get a slot in the stage's KV cache; every other token does. The
    *rank* of a retained token is its place in the stage's row of the KV cache: the number of retained tokens
    before it. If positions 2 to 9 are withdrawn, `count(12)` is 4, so the token at position 12 has rank 4.

    Under a ranking by question, only the number of visual tokens that stay is known before the prompt is
    computed. `withdrawn` then holds the first candidates, as many as will leave. All of them are computed in
    one step, so the counts after every step are right, and the worker finds out which tokens are held.

    Under a policy with gates, `withdrawn` is empty until the gates have decided; see `after_exit`.

    Args:
        withdrawn: Spans of withdrawn positions, ascending, non-empty and without overlap.
        shareable: Length of the prompt's prefix whose retention depends on the tokens of that prefix alone.
            KV blocks within it can be shared with other requests.
        one_step: The part of the prompt that has to be computed in one step. None if there is none.
        marks: By the position from which they hold, what the keys and values of the tokens that follow depend
            on beside the prompt: the layer at which visual tokens left, or which of them did.
        awaits_from: The position of the first image of which it is not known yet which tokens stay. None if
            there is none. What follows counts as retained.

    Attributes:
        num_withdrawn: Tokens of the whole request that the stage never holds.
        all_kept_from: The position from which on every token is retained.
    """

    def __init__(
        self,
        withdrawn: Sequence[Span] = (),
        shareable: int = sys.maxsize,
        one_step: OneStepPrefill | None = None,
        marks: Sequence[Mark] = (),
        awaits_from: int | None = None,
    ) -> None:
        self.withdrawn = tuple(withdrawn)
        self._starts = [start for start, _ in withdrawn]
        self._stops = [stop for _, stop in withdrawn]
        assert all(start < stop for start, stop in withdrawn)
        assert all(stop <= start for stop, start in zip(self._stops[:-1], self._starts[1:], strict=True))
        self._withdrawn_before = [0, *accumulate(stop - start for start, stop in withdrawn)]
        self._start_ranks = [
            start - before for start, before in zip(self._starts, self._withdrawn_before[:-1], strict=True)
        ]
        self.shareable = shareable
        self.one_step = one_step
        self.marks = tuple(marks)
        self.awaits_from = awaits_from
        self.num_withdrawn = self._withdrawn_before[-1]
        self.all_kept_from = self._stops[-1] if withdrawn else 0

    def count(self, num_tokens: int) -> int:
        """How many of the request's first `num_tokens` tokens the stage holds."""
        if num_tokens >= self.all_kept_from:
            return num_tokens - self.num_withdrawn
        spans = bisect_left(self._starts, num_tokens)
        if spans == 0:
            return num_tokens
        beyond = max(0, self._stops[spans - 1] - num_tokens)
        return num_tokens - self._withdrawn_before[spans] + beyond

    def position(self, rank: int) -> int:
        """The position of the retained token of a rank. The inverse of `count`."""
        return rank + self._withdrawn_before[bisect_right(self._start_ranks, rank)]

    def mark_before(self, position: int) -> bytes:
        """What distinguishes the row up to a position from those of other requests with the same tokens.

        What the stage computes at a position depends on the tokens before it, and on how many layers saw
        those of them that have left. Empty if none can have left.
        """
        before = bisect_left(self.marks, (position, b""))
        return self.marks[before - 1][1] if before else b""

    def keep_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Whether each of the positions from `start` to `stop - 1` is retained, shape `(stop - start,)`."""
        mask = np.ones(stop - start, dtype=bool)
        # A long video has a span for each of its frames, and is computed in many steps.
        for span in range(bisect_right(self._stops, start), bisect_left(self._starts, stop)):
            mask[max(self._starts[span] - start, 0) : self._stops[span] - start] = False
        return mask


EVERYTHING = Retention()
"""What stage 0 retains of every request."""


def of_stage(retentions: Sequence[Retention], stage: int) -> Retention:
    """What a stage retains of a request.

    Args:
        retentions: The request's retention in every stage past the first.
        stage: The stage, from 0 on.
    """
    return retentions[stage - 1] if stage else EVERYTHING


def visual_spans(mm_features: Iterable[Any], bridge: int) -> list[Span]:
    """The spans of a prompt whose embeddings come from an image or video encoder.

    Args:
        mm_features: The request's `MultiModalFeatureSpec`s.
        bridge: Gaps of up to this many tokens between two spans of one image count as visual, too. For
            example, with a bridge of 1 an image of rows at 5 to 8 and 10 to 13 has one span, 5 to 13. Gaps
            in a video, which hold timestamps, never do.
    """
    spans: list[Span] = []
    for feature in mm_features:
        if feature.modality not in VISUAL:
            continue
        of_feature: list[Span] = []
        for start, last in feature.mm_position.extract_embeds_range():
            is_bridged = of_feature and feature.modality == "image" and start - of_feature[-1][1] <= bridge
            of_feature.append((of_feature.pop()[0] if is_bridged else start, last + 1))
        spans += of_feature
    return spans


def image_key(mm_feature: Any) -> ImageKey:
    """The key under which the order of an image's or video's tokens is known.

    Args:
        mm_feature: Its `MultiModalFeatureSpec`.
    """
    spans = visual_spans([mm_feature], bridge=0)
    return mm_feature.identifier, sum(stop - start for start, stop in spans)


def prompt_retention(spans: Iterable[Span], num_prompt_tokens: int, align_to: int) -> Retention:
    """The retention of a stage that withdraws all visual tokens.

    Withdrawal goes by whole blocks of `align_to` tokens: a block is withdrawn if all its tokens are visual.
    With `align_to=16`, an image at positions 35 to 610 loses positions 48 to 607, and 16 of its 576 tokens
    stay. Spans that touch count as one, so a block may lie across two images. The prompt's last token always
    stays, as the first output token is sampled from its state.

    Args:
        spans: Spans of visual tokens.
        num_prompt_tokens: Tokens of the prompt.
        align_to: 1 to withdraw every visual token.
    """
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    blocks = ((-(-start // align_to) * align_to, stop // align_to * align_to) for start, stop in merged)
    withdrawn = [(start, stop) for start, stop in blocks if start < stop]
    if not withdrawn or withdrawn[-1][1] < num_prompt_tokens:
        return Retention(withdrawn)
    # The prompt's last block would be withdrawn. It stays here, but not in a longer prompt that begins with
    # the same tokens, so neither this block nor what follows can be shared.
    start, stop = withdrawn.pop()
    stop -= align_to
    if start < stop:
        withdrawn.append((start, stop))
    return Retention(withdrawn, shareable=stop)


def request_retentions(
    policy: Policy,
    mm_features: Iterable[Any],
    num_prompt_tokens: int,
    align_to: int,
    bridge: int,
    layer: int | None = None,
    keep: float | None = None,
    orders: Orders = NO_ORDERS,
) -> tuple[Retention, ...]:
    """The retention of every stage past the first, for one request.

    Args:
        policy: What is withdrawn, and before which layers.
        mm_features: The request's `MultiModalFeatureSpec`s.
        num_prompt_tokens: Tokens of the original prompt, also when a preempted request is resumed.
        align_to: 1 to withdraw every visual token, the KV block size to withdraw whole blocks. Policies
            that rank visual tokens or have gates always withdraw by tokens.
        bridge: As `visual_spans` takes it.
        layer: The layer that the request chose for its visual tokens to leave, or the number of layers if
            they stay. None if the request leaves it to the policy.
        keep: The share of visual tokens that the request chose to stay, as `Policy.keeping` takes it. None
            if the request leaves it to the policy.
        orders: Under a ranking by features, the orders of images. Some may not be known yet.
    """
    mm_features = list(mm_features)
    if keep is not None:
        policy = policy.keeping(keep)
        if policy.stages[-1].keep == 1:
            return (EVERYTHING,) * len(policy.stages)
    if not policy.withdraws_all:
        align_to = 1
    spans = visual_spans(mm_features, bridge)
    all_withdrawn = prompt_retention(spans, num_prompt_tokens, align_to)
    if layer is None:
        layer = policy.default_layer
    if layer is not None:
        withdrawn = all_withdrawn.withdrawn
        marks = [(withdrawn[0][0], layer.to_bytes(2))] if withdrawn else []
        leaving = Retention(withdrawn, all_withdrawn.shareable, marks=marks)
        return tuple(leaving if stage.layer >= layer else EVERYTHING for stage in policy.stages)
    if policy.ranking in BY_IMAGE:
        return tuple(_selected_retentions(policy, mm_features, num_prompt_tokens, bridge, orders))
    if not all_withdrawn.num_withdrawn:
        return (all_withdrawn,) * len(policy.stages)
    start = min(feature.mm_position.offset for feature in mm_features if feature.modality in VISUAL)
    gated = policy.gate is not None
    text_start = max(stop for _, stop in spans)
    one_step = OneStepPrefill(start, num_prompt_tokens, all_withdrawn.withdrawn, text_start, gated)
    if not gated:
        return tuple(_ranked_retentions(policy, one_step))
    # A gate reads the mean over all but the last token of the text. A text of one token has no such mean, so
    # gates are not asked and the visual tokens stay.
    all_kept = Retention((), start, one_step if one_step.text_tokens > 1 else None)
    return (all_kept,) * len(policy.stages)


def _selected_retentions(
    policy: Policy,
    mm_features: Iterable[Any],
    num_prompt_tokens: int,
    bridge: int,
    orders: Orders,
) -> Iterator[Retention]:
    """The retention of every stage past the first under a ranking by image alone."""
    images: list[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], bool]] = []
    marks: list[Mark] = []
    mark = repr([(stage.layer, stage.keep) for stage in policy.stages]).encode()
    by_features = policy.ranking in BY_FEATURES
    awaits_from, previous_stop = None, 0
    for feature in mm_features:
        place, before = feature.mm_position, previous_stop
        previous_stop = place.offset + place.length
        # The encoder makes no features of the tokens between its own.
        spans = visual_spans([feature], 0 if by_features else bridge)
        if not spans:
            continue
        tokens = np.concatenate([np.arange(start, stop) for start, stop in spans])
        # A step that has the encoder compute an image computes at least one token of the prompt itself,
        # before it is known what leaves. If the image follows nothing or another one, this is its first.
        first_stays = by_features and spans[0][0] == before
        if by_features:
            key = image_key(feature)
            if key not in orders:
                awaits_from = spans[0][0] + first_stays
                break
            by_worker = orders[key]
            mark = sha256(mark + by_worker.tobytes()).digest()
            images.append((tokens, by_worker, first_stays))
        else:
            by_place = IMAGE_RANKINGS[policy.ranking or ""]().order(len(tokens), feature.mm_hash)
            images.append((tokens, by_place, first_stays))
        marks.append((spans[0][0], mark))
    last = num_prompt_tokens - 1
    for stage in policy.stages:
        leaving: list[npt.NDArray[np.integer]] = [np.empty(0, dtype=np.int64)]
        for tokens, order, first_stays in images:
            # An order may hold no more tokens than stay at most where some leave.
            leaves = np.full(len(tokens), stage.keep < 1, dtype=np.bool_)
            leaves[order[: stage.kept(len(tokens))]] = False
            leaves[0] &= not first_stays
            leaving.append(tokens[leaves])
        withdrawn = np.sort(np.concatenate(leaving))
        shareable = sys.maxsize if awaits_from is None else awaits_from - 1
        if len(withdrawn) and withdrawn[-1] == last:
            # It stays here, as the first output token is sampled from its state, but not in longer prompts.
            withdrawn, shareable = withdrawn[:-1], last
        borders = np.flatnonzero(np.diff(withdrawn, prepend=-2, append=num_prompt_tokens + 1) > 1)
        runs = [(int(withdrawn[start]), int(withdrawn[stop - 1]) + 1) for start, stop in pairwise(borders)]
        yield Retention(runs, shareable, marks=marks, awaits_from=awaits_from)


def _ranked_retentions(policy: Policy, one_step: OneStepPrefill) -> Iterator[Retention]:
    for stage in policy.stages:
        leaving = one_step.visual_tokens - stage.kept(one_step.visual_tokens)
        yield Retention(list(_first(leaving, one_step.candidates)), one_step.start, one_step)


def awaits_gates(retentions: Sequence[Retention]) -> bool:
    """Whether gates have yet to decide about a request.

    Args:
        retentions: The request's retention in every stage past the first.
    """
    one_step = retentions[0].one_step if retentions else None
    return one_step is not None and one_step.gated


def awaits_image(retentions: Sequence[Retention]) -> bool:
    """Whether a request has an image of which it is not known yet which tokens stay.

    Args:
        retentions: The request's retention in every stage past the first.
    """
    return bool(retentions) and retentions[0].awaits_from is not None


def after_exit(retentions: Sequence[Retention], exit_stage: int | None) -> tuple[Retention, ...]:
    """The retention of every stage past the first, once gates have decided about a request.

    Args:
        retentions: The same before, as `request_retentions` returned them.
        exit_stage: The first stage that runs without the request's visual tokens. None if they stay.
    """
    one_step = retentions[0].one_step
    assert one_step is not None
    all_kept, all_withdrawn = Retention((), one_step.start), Retention(one_step.candidates, one_step.start)
    return tuple(
        all_kept if exit_stage is None or stage < exit_stage else all_withdrawn
        for stage in range(1, len(retentions) + 1)
    )


def _first(count: int, spans: Iterable[Span]) -> Iterator[Span]:
    """The spans of the first `count` positions of `spans`."""
    for start, stop in spans:
        if count <= 0:
            return
        yield start, min(stop, start + count)
        count -= stop - start
