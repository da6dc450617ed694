"""The step plan: for a batch and a stage, the tokens that stay and how far each moves up in its row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_vtw.retention import Question, Retention, decided, is_undecided

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """What the requests of a batch retain, one request a row.

    It serves for as long as the same requests stay in the same rows: one that was preempted comes back to
    another `Rows`.

    Attributes:
        retentions: By row: the retention of every stage past the first.
        num_withdrawn: Tokens of each whole request that a stage never holds, shape `(stages, rows)`.
        settled_at: The position from which on a stage holds every token, shape `(stages, rows)`.
        undecided: Rows whose visual tokens leave when a gate says so.
        prompt_logprobs: Whether a request wants those of its prompt, which are read off every token's row,
            withdrawn or not.
    """

    retentions: Sequence[tuple[Retention, ...]]
    num_withdrawn: Int32Array
    settled_at: IntArray
    undecided: Sequence[int]
    prompt_logprobs: bool

    @classmethod
    def of(cls, retentions: Sequence[tuple[Retention, ...]], prompt_logprobs: bool = False) -> "Rows":
        """The rows of requests with these retentions, of every stage past the first."""

        return cls(
            retentions,
            np.array([[stage.num_withdrawn for stage in row] for row in retentions], dtype=np.int32).T,
            np.array([[stage.settled_at for stage in row] for row in retentions], dtype=np.int64).T,
            [row for row, of_row in enumerate(retentions) if is_undecided(of_row)],
            prompt_logprobs,
        )

    def decided(self, exits: Mapping[int, int]) -> "Rows":
        """The rows once gates have decided, by row, from which stage on visual tokens are gone."""
        return Rows.of(
            [
                decided(of_row, exits[row]) if row in exits else of_row
                for row, of_row in enumerate(self.retentions)
            ],
            self.prompt_logprobs,
        )


def reads_prompt_rows(sampling_params: Any) -> bool:
    """Whether a request with vLLM's `sampling_params` wants logprobs of its prompt."""
    return sampling_params is not None and (
        sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids is not None
    )


class Batch(NamedTuple):
    """One step's work.

    Attributes:
        rows: The requests.
        num_computed: Tokens of each request that earlier steps computed, shape `(rows,)`. With speculative
            decoding it may be too large for a request that has its prompt behind it, where it does not
            matter: the plan of such a row is the same from there on.
        query_start_loc: Where the tokens of each row start in the batch, and where the last ones end, shape
            `(rows + 1,)`.
    """

    rows: Rows
    num_computed: npt.NDArray[np.integer]
    query_start_loc: npt.NDArray[np.integer]

    @property
    def is_settled(self) -> bool:
        """Whether every row has its last withdrawn token behind it."""
        return bool((self.num_computed >= self.rows.settled_at).all())

    @property
    def is_one_token_each(self) -> bool:
        return bool(self.query_start_loc[-1] == len(self.num_computed))

    def asked(self) -> dict[int, Question]:
        """By row: the prompts that gates decide about in this step.

        Gates read what a step ends with. A prompt that a step cuts, or goes on behind, is not asked about: it
        keeps everything, and the scheduler ends it.
        """
        questions = {row: self.rows.retentions[row][0].question for row in self.rows.undecided}
        asked = {}
        for row, question in questions.items():
            assert question is not None
            start = int(self.num_computed[row])
            stop = start + int(self.query_start_loc[row + 1] - self.query_start_loc[row])
            if question.is_whole_in(start, stop) and stop == question.stop:
                asked[row] = question
        return asked

    def repeat(self, of_rows: Int32Array) -> Int32Array:
        """For each token what `of_rows` says of its row, shape `(tokens,)`."""
        return np.repeat(of_rows, np.diff(self.query_start_loc))


@dataclass(frozen=True)
class Withdrawal:
    """The tokens that leave in a step, and those that do not.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, ascending, shape `(kept,)`.
        left: Indices of the others, shape `(left,)`.
        shifts: Withdrawn tokens of the same request before each token of the batch, shape `(tokens,)`.
        query_start_loc: Where each row's tokens start among the kept, shape `(rows + 1,)`.
        ranked: Rows whose prompt ranks its visual tokens in this step. What is `kept` and `left` of them is
            right in number, and stands for tokens that are chosen later.
    """

    kept: IntArray
    left: IntArray
    shifts: Int32Array
    query_start_loc: IntArray
    ranked: tuple[int, ...]


@dataclass(frozen=True)
class StagePlan:
    """What one stage makes of a batch.

    A token's rank, its place in the stage's row, is its position less the withdrawn tokens before it. Only
    the worker's device knows positions for certain, so the plan holds what to subtract.

    Attributes:
        withdrawn: Tokens of each row that the stage does not hold after the step, shape `(rows,)`.
        settled: Whether `withdrawn` is what the rows withdraw altogether.
        withdrawal: None where every token of the batch stays; `withdrawn` then shifts all of a row's tokens.
    """

    withdrawn: Int32Array
    settled: bool
    withdrawal: Withdrawal | None = None


def plan_stage(batch: Batch, stage: int) -> StagePlan:
    """The plan of `stage`, 1 or deeper."""
    withdrawn = batch.rows.num_withdrawn[stage - 1]
    # Past its last withdrawn token a row needs no looking into: in decode, every row.
    unsettled = np.flatnonzero(batch.num_computed < batch.rows.settled_at[stage - 1])
    if len(unsettled) == 0:
        return StagePlan(withdrawn, settled=True)

    withdrawn = withdrawn.copy()
    starts = batch.query_start_loc
    keep = np.ones(starts[-1], dtype=bool)
    chunks, ranked = [], []
    for row in unsettled:
        retention = batch.rows.retentions[row][stage - 1]
        start = int(batch.num_computed[row])
        tokens = slice(starts[row], starts[row + 1])
        stop = start + int(tokens.stop - tokens.start)
        if retention.question is not None and retention.question.is_whole_in(start, stop):
            ranked.append(int(row))
        keep[tokens] = retention.keep(start, stop)
        withdrawn[row] = stop - retention.count(stop)
        chunks.append((tokens, start - retention.count(start)))
    if keep.all():
        return StagePlan(withdrawn, settled=False)

    shifts = batch.repeat(withdrawn)
    for tokens, before in chunks:
        left = ~keep[tokens]
        shifts[tokens] = before + np.cumsum(left) - left
    kept_before = np.concatenate(([0], np.cumsum(keep)))
    withdrawal = Withdrawal(
        np.flatnonzero(keep), np.flatnonzero(~keep), shifts, kept_before[starts], tuple(ranked)
    )
    return StagePlan(withdrawn, settled=False, withdrawal=withdrawal)


def candidates(batch: Batch, ranked: Iterable[int]) -> npt.NDArray[np.bool_]:
    """For each token of the batch, whether it is one of those that the prompts of rows `ranked` rank."""
    mask = np.zeros(batch.query_start_loc[-1], dtype=bool)
    for row in ranked:
        question = batch.rows.retentions[row][0].question
        assert question is not None
        in_batch = int(batch.query_start_loc[row]) - int(batch.num_computed[row])
        for start, stop in question.candidates:
            mask[in_batch + start : in_batch + stop] = True
    return mask
