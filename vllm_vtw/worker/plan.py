"""The step plan: for a batch and a stage, the kept tokens, their ranks, and the lengths of every row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_vtw.retention import Retention

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One step's requests, in the order of their rows.

    Attributes:
        retentions: By row: the retention of every stage past the first.
        num_computed: Tokens of each request that earlier steps computed, shape `(rows,)`.
        num_scheduled: Tokens of each request in this step, shape `(rows,)`.
    """

    retentions: Sequence[tuple[Retention, ...]]
    num_computed: IntArray
    num_scheduled: IntArray


@dataclass(frozen=True)
class StagePlan:
    """What one stage computes of a batch.

    Attributes:
        kept: Indices of the stage's tokens in the batch, ascending, shape `(tokens,)`; None for all of them.
        rows: The row of each of the stage's tokens, shape `(tokens,)`.
        ranks: Each token's place in the stage's row, shape `(tokens,)`.
        query_start_loc: Where each row's tokens start among the stage's, shape `(rows + 1,)`.
        seq_lens: Tokens that the stage holds of each request after the step, shape `(rows,)`.
    """

    kept: IntArray | None
    rows: IntArray
    ranks: IntArray
    query_start_loc: IntArray
    seq_lens: IntArray


def plan_stage(batch: Batch, stage: int) -> StagePlan | None:
    """The plan of `stage`, 1 or deeper. None when no request of the batch has lost a token to it."""
    retentions = [by_stage[stage - 1] for by_stage in batch.retentions]
    num_rows = len(retentions)
    withdrawn = np.fromiter((r.num_withdrawn for r in retentions), np.int64, num_rows)
    if not withdrawn.any():
        return None
    stops = batch.num_computed + batch.num_scheduled
    # Exact for every row that has all its images behind it: in decode, all of them.
    held_before, seq_lens = batch.num_computed - withdrawn, stops - withdrawn
    settled_at = np.fromiter((r.settled_at for r in retentions), np.int64, num_rows)
    unsettled = np.flatnonzero(batch.num_computed < settled_at)
    for row in unsettled:
        held_before[row] = retentions[row].count(int(batch.num_computed[row]))
        seq_lens[row] = retentions[row].count(int(stops[row]))

    lengths = seq_lens - held_before
    query_start_loc = _starts(lengths)
    rows = np.repeat(np.arange(num_rows), lengths)
    ranks = np.arange(query_start_loc[-1]) + (held_before - query_start_loc[:-1])[rows]
    kept = None
    if len(rows) < batch.num_scheduled.sum():
        batch_starts = _starts(batch.num_scheduled)
        mask = np.ones(batch_starts[-1], dtype=bool)
        for row in unsettled:
            tokens = slice(batch_starts[row], batch_starts[row + 1])
            mask[tokens] = retentions[row].keep(int(batch.num_computed[row]), int(stops[row]))
        kept = np.flatnonzero(mask)
    return StagePlan(kept, rows, ranks, query_start_loc, seq_lens)


def _starts(lengths: IntArray) -> IntArray:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
