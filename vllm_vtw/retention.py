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
class Ranking:
    """What a request's ranked stages choose from.

    Attributes:
        start: Where the prompt's first picture begins. From here to its end a prompt is computed in one step.
        stop: The prompt's length. Its last token's attention ranks.
        candidates: Spans of the visual tokens that may leave, ascending.
    """

    start: int
    stop: int
    candidates: tuple[Span, ...]

    @property
    def visual_tokens(self) -> int:
        """How many the candidates are."""
        return sum(stop - start for start, stop in self.candidates)


class Retention:
    """What one stage holds of one request's tokens, prompt and output alike.

    The tokens at `withdrawn` positions are never stored; every other token is. The *rank* of a retained
    token, its place in the stage's row, is the number of retained tokens before it: `count(position)`.

    But where tokens are ranked, only their number is known before the prompt is computed: `withdrawn` is the
    first candidates, which stand for those that leave. As the prompt is computed in one step from its first
    picture on, every count after a step is right; which positions are held the model finds out.

    Args:
        withdrawn: Spans of withdrawn prompt positions, ascending, neither empty nor overlapping.
        shareable: So many tokens, at the start, any request that begins with the same ones retains alike.
        ranking: Where `withdrawn` says how many leave, and not which.
    """

    def __init__(
        self,
        withdrawn: Sequence[Span] = (),
        shareable: int = sys.maxsize,
        ranking: Ranking | None = None,
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
        self.ranking = ranking
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
    if policy.ranking is None:
        retention = prompt_retention(visual_spans(mm_features), num_prompt_tokens, align_to)
        return (retention,) * len(policy.stages)
    return tuple(_ranked_retentions(policy, list(mm_features), num_prompt_tokens))


def _ranked_retentions(
    policy: Policy, mm_features: Sequence[Any], num_prompt_tokens: int
) -> Iterator[Retention]:
    everything = prompt_retention(visual_spans(mm_features), num_prompt_tokens, align_to=1)
    if not everything.num_withdrawn:
        yield from (Retention() for _ in policy.stages)
        return
    start = min(feature.mm_position.offset for feature in mm_features if feature.modality in VISUAL)
    ranking = Ranking(start, num_prompt_tokens, everything.withdrawn)
    for stage in policy.stages:
        leaving = everything.num_withdrawn - stage.kept(everything.num_withdrawn)
        yield Retention(list(_first(leaving, everything.withdrawn)), start, ranking)


def _first(count: int, spans: Iterable[Span]) -> Iterator[Span]:
    """The spans of the first `count` positions of `spans`."""
    for start, stop in spans:
        if count <= 0:
            return
        yield start, min(stop, start + count)
        count -= stop - start
