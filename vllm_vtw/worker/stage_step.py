# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""One stage of the current step on the device: its tokens, their KV slots, and its attention metadata."""

import copy

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_vtw.worker.ranking import RankedPrompt, RankedPrompts
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer
from vllm_vtw.worker.step_plan import Batch, StagePlan


def longest_query(query_start_loc: np.ndarray) -> int:
    """The `max_query_len` of a batch in which rows may have no tokens.

    Kernels take 1 for "every row has one token": FlashAttention 2 with grouped queries reshapes by the number
    of rows then. For starts `[0, 1, 1, 2]`, where the second row has no token, the result is therefore 2. It
    is an upper bound all the same.
    """
    lengths = np.diff(query_start_loc)
    longest = int(lengths.max())
    return longest if longest > 1 or lengths.all() else 2


class StageStep:
    """What one stage computes in the current step.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, shape `(kept,)`. None for all.
        gather: Indices of the same tokens among those of the stage before. None if both stages compute the
            same tokens.
        num_tokens: The number of these tokens.
        query_start_loc: Where each row's tokens start among them, followed by their number, shape
            `(rows + 1,)`.
        ranked: The prompts whose visual tokens are ranked before the stage begins. `apply_ranking` has to be
            called before anything is gathered. None if there are none.

    Args:
        plan: The stage's plan.
        before: The stage before, if it is not stage 0.
        num_withdrawn: `plan.num_withdrawn` on the device.
        batch: The step.
        fixed_shape: Whether a CUDA graph replays the step. Withdrawn tokens are then computed with the
            others, but not stored.
    """

    def __init__(
        self,
        plan: StagePlan,
        before: "StageStep | None",
        num_withdrawn: torch.Tensor,
        batch: Batch,
        fixed_shape: bool,
    ) -> None:
        self.plan = plan
        self.num_withdrawn = num_withdrawn
        self._least_withdrawn = int(plan.num_withdrawn.min())
        self.kept: torch.Tensor | None = None
        self.gather: torch.Tensor | None = None
        self.ranked: RankedPrompts | None = None
        self.num_tokens = int(batch.query_start_loc[-1])
        self.query_start_loc = batch.query_start_loc
        self._starts_cpu: np.ndarray | None = None
        self._not_stored: torch.Tensor | None = None
        self._ranks: torch.Tensor | None = None
        device = num_withdrawn.device
        if plan.split is None:
            # Positions are int64. Subtracting an int32 tensor from them takes twice as long.
            self._shifts = num_withdrawn.long()
            if not batch.is_one_token_each:
                self._shifts = async_tensor_h2d(batch.repeat(plan.num_withdrawn), device)
            return
        self._shifts = async_tensor_h2d(plan.split.shifts, device)
        if fixed_shape:
            assert batch.is_one_token_each, "a chunk of several tokens cannot be cut in a graph"
            assert not plan.split.ranked
            self._not_stored = async_tensor_h2d(plan.split.left_out, device)
            return
        self.kept = async_tensor_h2d(plan.split.kept, device)
        self._shifts = self._shifts[self.kept]
        self.gather = self.kept
        self._kept_before = None if before is None else before.kept
        if before is not None and before.plan.split is not None:
            kept_before = before.plan.split.kept
            if len(kept_before) == len(self.kept):
                # The very same tensor, as a ranking may still write into it.
                self.kept, self.gather = before.kept, None
            else:
                gather = np.searchsorted(kept_before, plan.split.kept)
                self.gather = async_tensor_h2d(gather, device)
        self.num_tokens = len(plan.split.kept)
        self.query_start_loc = plan.split.query_start_loc
        self._starts_cpu = self.query_start_loc.astype(np.int32)
        self._starts = async_tensor_h2d(self._starts_cpu, device)

    def prepare_ranking(
        self, batch: Batch, stage: int, starts_before: np.ndarray, mask: torch.Tensor
    ) -> None:
        """Sets `ranked`, if prompts of this step rank their visual tokens for this stage.

        Args:
            batch: The step.
            stage: The number of this stage.
            starts_before: `query_start_loc` of the stage before, shape `(rows + 1,)`.
            mask: Whether each token of the batch is a ranked visual token, shape `(tokens,)`.
        """
        assert self.plan.split is not None
        if self.gather is None or not self.plan.split.ranked:
            return
        starts = self.plan.split.query_start_loc
        self._mask = mask
        prompts = [
            RankedPrompt.of(
                batch.retentions.by_row[row],
                stage,
                row,
                int(batch.num_computed[row]),
                slice(int(starts_before[row]), int(starts_before[row + 1])),
                slice(int(starts[row]), int(starts[row + 1])),
            )
            for row in self.plan.split.ranked
        ]
        self.ranked = RankedPrompts(prompts, self.num_withdrawn.device)

    def apply_ranking(self, scores: torch.Tensor | None) -> None:
        """Replaces the indices of `kept` and `gather` by those of the tokens that stay.

        All text of the ranked prompts stays, and the visual tokens with the highest scores do.

        Args:
            scores: As `RankedPrompts.select` takes them.
        """
        assert self.ranked is not None
        assert self.kept is not None
        assert self.gather is not None
        selected = self.ranked.select(scores, self._kept_before, self._mask)
        self.kept[self.ranked.targets] = (
            selected if self._kept_before is None else self._kept_before[selected]
        )
        self.gather[self.ranked.targets] = selected

    def reset_ranks(self) -> None:
        """Forgets the ranks of the step before, whose plan this step shares."""
        self._ranks = None

    def set_ranks(self, positions: torch.Tensor) -> None:
        """Computes the rank of each of the stage's tokens, once a step.

        Args:
            positions: Positions of the tokens of the whole batch, shape `(at least tokens,)`.
        """
        if self._ranks is None:
            if self.kept is not None:
                positions = positions[self.kept]
            elif positions.shape[0] > self.num_tokens:
                positions = positions[: self.num_tokens]
            self._ranks = positions - self._shifts

    def write_slots(
        self, slots: SlotMapping, batch: CommonAttentionMetadata, block_table: torch.Tensor, block_size: int
    ) -> None:
        """Writes the KV slot of each of the stage's tokens under one group's block table."""
        assert self._ranks is not None, "no group of this stage had its metadata built"
        starts = batch.query_start_loc if self._starts_cpu is None else self._starts
        slots.write(self.num_tokens, starts, self._ranks, block_table, block_size)
        if self._not_stored is not None:
            slots.skip(self._not_stored)

    def metadata(self, batch: CommonAttentionMetadata, seq_lens: StepBuffer) -> CommonAttentionMetadata:
        """The batch's metadata for this stage: fewer tokens and shorter rows.

        The block table and the slots are still those of the batch.

        Args:
            batch: The metadata of all tokens. Rows may be padded for a CUDA graph.
            seq_lens: Receives the lengths of the rows, int32.
        """
        rows = len(self.plan.num_withdrawn)
        lengths = seq_lens.view(batch.num_reqs)
        if rows == batch.num_reqs:
            torch.sub(batch.seq_lens, self.num_withdrawn, out=lengths)
        else:
            torch.sub(batch.seq_lens[:rows], self.num_withdrawn, out=lengths[:rows])
            lengths[rows:] = 0
        # `batch.replace` runs the constructor, which takes 13 microseconds longer in every step.
        of_stage = copy.copy(batch)
        of_stage.seq_lens = lengths
        # An upper bound, which is all that backends need. The exact number would cost as much as all lengths.
        of_stage.max_seq_len = batch.max_seq_len - self._least_withdrawn
        of_stage.seq_lens_cpu_upper_bound = None
        if self._starts_cpu is not None:
            assert batch.num_reqs == rows, "a step of a fixed shape gathers nothing"
            of_stage.query_start_loc = self._starts
            of_stage.query_start_loc_cpu = torch.from_numpy(self._starts_cpu)
            of_stage.num_actual_tokens = self.num_tokens
            of_stage.max_query_len = longest_query(self._starts_cpu)
        # The rotary embedding has been applied before. Builders would take these positions, which are of the
        # whole batch, for those of the stage's tokens.
        of_stage.positions = None
        of_stage._num_computed_tokens_cache = of_stage._token_to_req_indices_cache = None
        return of_stage
