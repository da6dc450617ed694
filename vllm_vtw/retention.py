"""Which of a request's tokens a stage holds: the one piece of arithmetic that scheduler and worker share."""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vtw.policy import Policy

VISUAL = ("image", "video")
Span = tuple[int, int]
"""A half-open range of prompt positions, `start <= position < stop`."""


@dataclass(frozen=True)
class Question:
    """A prompt from its first picture on, computed in one step, as what leaves depends on all of it.

    Attributes:
        start: Where the prompt's first picture begins.
        stop: The prompt's length. Its last token's attention ranks.
        candidates: Spans of the visual tokens that may leave, ascending.
        text_start: Where the text behind the last picture begins.
        gated: Whether gates read that text and decide when all candidates leave; otherwise they are ranked.
    """

    start: int
    stop: int
    candidates: tuple[Span, ...]
    text_start: int
    gated: bool

    def is_whole_in(self, start: int, stop: int) -> bool:
        """Whether a step that computes positions `start` to `stop - 1` takes all of it."""
        return start <= self.start and self.stop <= stop

    @property
    def visual_tokens(self) -> int:
        """How many the candidates are."""
        return sum(stop - start for start, stop in self.candidates)

    @property
    def text_tokens(self) -> int:
        """How many come after the last picture."""
        return self.stop - self.text_start


class Retention:
    """What one stage holds of one request's tokens, prompt and output alike.

    The tokens at `withdrawn` positions are never stored; every other token is. The *rank* of a retained
    token, its place in the stage's row, is the number of retained tokens before it: `count(position)`.

    But where tokens are ranked, only their number is known before the prompt is computed: `withdrawn` is the
    first candidates, which stand for those that leave. As the prompt is computed in one step from its first
    picture on, every count after a step is right; which positions are held the model finds out.

    And where gates decide, nothing is `withdrawn` until they have: see `decided`.

    Args:
        withdrawn: Spans of withdrawn prompt positions, ascending, neither empty nor overlapping.
        shareable: So many tokens, at the start, any request that begins with the same ones retains alike.
        question: Where it is not known yet which tokens leave.
    """

    def __init__(
        self,
        withdrawn: Sequence[Span] = (),
        shareable: int = sys.maxsize,
        question: Question | None = None,
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
        self.question = question
        self.num_withdrawn = self._withdrawn_before[-1]
        """Tokens of the whole request that the stage never holds."""
        self.settled_at = self._stops[-1] if withdrawn else 0
        """From this position on every token is retained."""

    def count(self, num_tokens: int) -> int:
        """How many of the request's first `num_tokens` tokens the stage holds."""
        if num_tokens >= self.settled_at:
            return num_tokens - self.num_withdrawn
        spans = bisect_left(self._starts, num_tokens)
        if spans == 0:
            return num_tokens
        beyond = max(0, self._stops[spans - 1] - num_tokens)
        return num_tokens - self._withdrawn_before[spans] + beyond

    def position(self, rank: int) -> int:
        """Where in the request the retained token of this rank is: the inverse of `count`."""
        return rank + self._withdrawn_before[bisect_right(self._start_ranks, rank)]

    def keep(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Whether each position in `start..stop-1` is retained, shape `(stop - start,)`."""
        mask = np.ones(stop - start, dtype=bool)
        for first, last in zip(self._starts, self._stops, strict=True):
            mask[max(first - start, 0) : max(last - start, 0)] = False
        return mask


def visual_spans(mm_features: Iterable[Any]) -> list[Span]:
    """The spans whose embeddings come from an image or video encoder (vLLM's `MultiModalFeatureSpec`s)."""
    return [
        (first, last + 1)
        for feature in mm_features
        if feature.modality in VISUAL
        for first, last in feature.mm_position.extract_embeds_range()
    ]


def prompt_retention(spans: Iterable[Span], num_prompt_tokens: int, align_to: int) -> Retention:
    """Withdraws visual positions by whole blocks of `align_to`, but never the prompt's last token.

    Spans that touch count as one, so a block may lie across two images.
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
    # The prompt ends in a block that leaves. In a prompt that goes on from here it does leave.
    start, stop = withdrawn.pop()
    stop -= align_to
    if start < stop:
        withdrawn.append((start, stop))
    return Retention(withdrawn, shareable=stop)


def request_retentions(
    policy: Policy, mm_features: Iterable[Any], num_prompt_tokens: int, align_to: int
) -> tuple[Retention, ...]:
    """The retention of every stage past the first, for one request.

    Args:
        policy: What is withdrawn, and before which layers.
        mm_features: The request's `MultiModalFeatureSpec`s.
        num_prompt_tokens: Length of the prompt as it came, also when a preempted request is resumed.
        align_to: 1 to withdraw by tokens, the KV block size to withdraw by whole blocks.
    """
    mm_features = list(mm_features)
    if policy.depends_on_question:
        align_to = 1
    spans = visual_spans(mm_features)
    everything = prompt_retention(spans, num_prompt_tokens, align_to)
    if not policy.depends_on_question or not everything.num_withdrawn:
        return (everything,) * len(policy.stages)
    start = min(feature.mm_position.offset for feature in mm_features if feature.modality in VISUAL)
    gated = policy.gate is not None
    text_start = max(stop for _, stop in spans)
    question = Question(start, num_prompt_tokens, everything.withdrawn, text_start, gated)
    if not gated:
        return tuple(_ranked_retentions(policy, question))
    # There is no mean of the text but the last token where that is all there is.
    undecided = Retention((), start, question if question.text_tokens > 1 else None)
    return (undecided,) * len(policy.stages)


def _ranked_retentions(policy: Policy, question: Question) -> Iterator[Retention]:
    for stage in policy.stages:
        leaving = question.visual_tokens - stage.kept(question.visual_tokens)
        yield Retention(list(_first(leaving, question.candidates)), question.start, question)


def is_undecided(retentions: Sequence[Retention]) -> bool:
    """Whether gates have yet to decide about a request, given its retention of every stage past the first."""
    question = retentions[0].question if retentions else None
    return question is not None and question.gated


def decided(undecided: Sequence[Retention], exit_stage: int) -> tuple[Retention, ...]:
    """The retention of every stage past the first, once gates have decided about a request.

    Args:
        undecided: What `request_retentions` said.
        exit_stage: The first stage without its visual tokens; the number of stages where they stay.
    """
    question = undecided[0].question
    assert question is not None
    stays, gone = Retention((), question.start), Retention(question.candidates, question.start)
    return tuple(gone if stage >= exit_stage else stays for stage in range(1, len(undecided) + 1))


def _first(count: int, spans: Iterable[Span]) -> Iterator[Span]:
    """The spans of the first `count` positions of `spans`."""
    for start, stop in spans:
        if count <= 0:
            return
        yield start, min(stop, start + count)
        count -= stop - start
