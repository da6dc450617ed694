# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The step plan: which tokens of a batch each stage computes, and how far each moves up in its row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_vtw.retention import OneStepPrefill, Retention, after_exit, awaits_gates

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BatchRetentions:
    """What the stages past the first retain of the requests of a batch, one request a row.

    The object is valid as long as the same requests are in the same rows of the batch. A request that is
    preempted and resumed gets into a new `BatchRetentions`.

    Attributes:
        by_row: For each row, the request's retention in every stage past the first.
        num_withdrawn: Tokens of each request that a stage never holds, shape `(stages, rows)`.
        all_kept_from: The prompt position from which on a stage holds every token, shape `(stages, rows)`.
        awaiting_gates: Rows of requests that gates have not decided about yet.
        prompt_logprobs: Whether a request of the batch wants logprobs of its prompt. They are computed from
            the rows of all prompt tokens, withdrawn ones included.
    """

    by_row: Sequence[tuple[Retention, ...]]
    num_withdrawn: Int32Array
    all_kept_from: IntArray
    awaiting_gates: Sequence[int]
    prompt_logprobs: bool

    @classmethod
    def of(cls, by_row: Sequence[tuple[Retention, ...]], prompt_logprobs: bool = False) -> "BatchRetentions":
        """Builds the arrays from the retentions of each row."""
        return cls(
            by_row,
            np.array([[stage.num_withdrawn for stage in row] for row in by_row], dtype=np.int32).T,
            np.array([[stage.all_kept_from for stage in row] for row in by_row], dtype=np.int64).T,
            [row for row, retentions in enumerate(by_row) if awaits_gates(retentions)],
            prompt_logprobs,
        )

    def after_exits(self, exits: Mapping[int, int | None]) -> "BatchRetentions":
        """The retentions once gates have decided.

        Args:
            exits: For each row that gates decided about, the exit stage, as `retention.after_exit` takes it.
        """
        return BatchRetentions.of(
            [
                after_exit(retentions, exits[row]) if row in exits else retentions
                for row, retentions in enumerate(self.by_row)
            ],
            self.prompt_logprobs,
        )


def wants_prompt_logprobs(sampling_params: Any) -> bool:
    """Whether a request with these `SamplingParams` (None for a pooling request) wants prompt logprobs."""
    return sampling_params is not None and (
        sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids is not None
    )


class Batch(NamedTuple):
    """The requests of one step, and the tokens that the step computes of each.

    Attributes:
        retentions: What the requests retain.
        num_computed: Tokens of each request that earlier steps computed, shape `(rows,)`. With speculative
            decoding the number may be too large for a request that decodes. The plan does not depend on it
            there: once the prompt is computed, every stage keeps every token.
        query_start_loc: Where the tokens of each row start in the batch, followed by the number of tokens,
            shape `(rows + 1,)`.
    """

    retentions: BatchRetentions
    num_computed: npt.NDArray[np.integer]
    query_start_loc: npt.NDArray[np.integer]

    @property
    def is_past_withdrawn(self) -> bool:
        """Whether every request is past its last withdrawn token, in every stage."""
        return bool((self.num_computed >= self.retentions.all_kept_from).all())

    @property
    def is_one_token_each(self) -> bool:
        """Whether the step computes one token of each request."""
        return bool(self.query_start_loc[-1] == len(self.num_computed))

    def gated_prompts(self) -> dict[int, OneStepPrefill]:
        """The prompts that gates decide about in this step, by row.

        Gates read the states of a prompt's last tokens. A step that computes only a part of the prompt, or
        tokens after it, asks them nothing: the request keeps its visual tokens, and the scheduler ends it
        with an error.
        """
        prompts = {}
        for row in self.retentions.awaiting_gates:
            one_step = self.retentions.by_row[row][0].one_step
            assert one_step is not None
            start = int(self.num_computed[row])
            stop = start + int(self.query_start_loc[row + 1] - self.query_start_loc[row])
            if one_step.is_whole_in(start, stop) and stop == one_step.stop:
                prompts[row] = one_step
        return prompts

    def repeat(self, of_rows: Int32Array) -> Int32Array:
        """Repeats a number of each row for all of the row's tokens, shape `(tokens,)`."""
        return np.repeat(of_rows, np.diff(self.query_start_loc))


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of a step, split into those that a stage computes and those that it withdraws.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, ascending, shape `(kept,)`.
        left_out: Indices of the other tokens, shape `(left_out,)`.
        shifts: For each token of the batch, how many tokens of its request are withdrawn before it, shape
            `(tokens,)`.
        query_start_loc: Where each row's tokens start among the kept ones, followed by their number, shape
            `(rows + 1,)`.
        ranked: Rows whose visual tokens are ranked in this step. For these rows `kept` and `left_out` have
            the right number of visual tokens, but which ones they are is known only after ranking.
    """

    kept: IntArray
    left_out: IntArray
    shifts: Int32Array
    query_start_loc: IntArray
    ranked: tuple[int, ...]


@dataclass(frozen=True)
class StagePlan:
    """What one stage computes of a batch.

    A token's rank, its place in the stage's row of the KV cache, is its position less the number of withdrawn
    tokens before it. For example, if tokens 2 to 9 of a prompt are withdrawn, token 12 has rank 4. Only the
    worker's device knows positions for certain, so the plan holds the numbers to subtract.

    Attributes:
        num_withdrawn: Tokens of each row that the stage does not hold after the step, shape `(rows,)`.
        is_final: Whether `num_withdrawn` is all that the rows will ever withdraw.
        split: The step's tokens, split. None where the stage computes all of them; each token of a row then
            moves up by the row's `num_withdrawn`.
    """

    num_withdrawn: Int32Array
    is_final: bool
    split: TokenSplit | None = None


def plan_stage(batch: Batch, stage: int) -> StagePlan:
    """Plans a step of one stage.

    Args:
        batch: The step.
        stage: 1 or deeper. Stage 0 computes every token and needs no plan.
    """
    num_withdrawn = batch.retentions.num_withdrawn[stage - 1]
    # A row that is past its last withdrawn token needs no further look. In decode, that is every row.
    prefilling = np.flatnonzero(batch.num_computed < batch.retentions.all_kept_from[stage - 1])
    if len(prefilling) == 0:
        return StagePlan(num_withdrawn, is_final=True)

    num_withdrawn = num_withdrawn.copy()
    starts = batch.query_start_loc
    keep = np.ones(starts[-1], dtype=bool)
    chunks, ranked = [], []
    for row in prefilling:
        retention = batch.retentions.by_row[row][stage - 1]
        start = int(batch.num_computed[row])
        tokens = slice(starts[row], starts[row + 1])
        stop = start + int(tokens.stop - tokens.start)
        if retention.one_step is not None and retention.one_step.is_whole_in(start, stop):
            ranked.append(int(row))
        keep[tokens] = retention.keep_mask(start, stop)
        num_withdrawn[row] = stop - retention.count(stop)
        chunks.append((tokens, start - retention.count(start)))
    if keep.all():
        return StagePlan(num_withdrawn, is_final=False)

    shifts = batch.repeat(num_withdrawn)
    for tokens, before in chunks:
        leaving = ~keep[tokens]
        shifts[tokens] = before + np.cumsum(leaving) - leaving
    kept_before = np.concatenate(([0], np.cumsum(keep)))
    split = TokenSplit(
        np.flatnonzero(keep), np.flatnonzero(~keep), shifts, kept_before[starts], tuple(ranked)
    )
    return StagePlan(num_withdrawn, is_final=False, split=split)


def ranked_tokens(batch: Batch, rows: Iterable[int]) -> npt.NDArray[np.bool_]:
    """For each token of the batch, whether it is one of the visual tokens that `rows` rank.

    Returns:
        Shape `(tokens,)`.
    """
    mask = np.zeros(batch.query_start_loc[-1], dtype=bool)
    for row in rows:
        one_step = batch.retentions.by_row[row][0].one_step
        assert one_step is not None
        offset = int(batch.query_start_loc[row]) - int(batch.num_computed[row])
        for start, stop in one_step.candidates:
            mask[offset + start : offset + stop] = True
    return mask
