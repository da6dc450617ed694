"""The step at hand, shared by a worker's runner, attention builders and model."""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_vtw.worker.buffers import Front, Slots
from vllm_vtw.worker.plan import Batch, Rows, StagePlan, plan_stage


class StageStep:
    """A stage's plan on the device.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, shape `(kept,)`; None for all.
        gather: Indices of the same tokens among those of the stage before; None when both compute the same.
        num_tokens: How many they are.

    Args:
        plan: The stage's plan.
        before: The plan of the stage before.
        withdrawn: `plan.withdrawn` on the device.
        token_rows: The row of each token of the batch, on the device, shape `(tokens,)`.
        fixed_shape: A CUDA graph replays the step: withdrawn tokens are computed with the others, and only
            not stored.
    """

    def __init__(
        self,
        plan: StagePlan,
        before: StagePlan | None,
        withdrawn: torch.Tensor,
        token_rows: torch.Tensor,
        fixed_shape: bool,
    ) -> None:
        self.plan = plan
        self.withdrawn = withdrawn
        self.token_rows = token_rows
        self.kept: torch.Tensor | None = None
        self.gather: torch.Tensor | None = None
        self.query_start_loc: np.ndarray | None = None
        self._not_stored: torch.Tensor | None = None
        self._ranks: torch.Tensor | None = None
        self.num_tokens = len(token_rows)
        if plan.withdrawal is None:
            self.shifts = withdrawn[token_rows].long()  # positions are int64, lengths are not
            return
        device = withdrawn.device
        self.shifts = async_tensor_h2d(plan.withdrawal.shifts, device)
        if fixed_shape:
            assert len(token_rows) == len(withdrawn), "a chunk of several tokens cannot be cut in a graph"
            self._not_stored = async_tensor_h2d(plan.withdrawal.left, device)
            return
        self.kept = async_tensor_h2d(plan.withdrawal.kept, device)
        self.gather = self.kept
        if before is not None and before.withdrawal is not None:
            self.gather = _gather(plan.withdrawal.kept, before.withdrawal.kept, device)
        self.shifts = self.shifts[self.kept]
        self.token_rows = token_rows[self.kept]
        self.num_tokens = len(plan.withdrawal.kept)
        self.query_start_loc = plan.withdrawal.query_start_loc.astype(np.int32)

    def begin_again(self) -> None:
        """Forgets where the tokens of the step before lay; the plan is the same as long as rows decode."""
        self._ranks = None

    def place(self, positions: torch.Tensor) -> None:
        """Settles the ranks of the stage's tokens.

        Args:
            positions: Of the tokens of the whole batch, shape `(at least tokens,)`.
        """
        if self._ranks is None:
            if self.kept is not None:
                positions = positions[self.kept]
            elif positions.shape[0] > self.num_tokens:
                positions = positions[: self.num_tokens]
            self._ranks = positions - self.shifts

    def write_slots(self, slots: Slots, block_table: torch.Tensor, block_size: int) -> None:
        """Writes the KV slot of each of the stage's tokens under a group's block table."""
        assert self._ranks is not None, "no group of this stage had its metadata built"
        slots.write(self.num_tokens, self.token_rows, self._ranks, block_table, block_size)
        if self._not_stored is not None:
            slots.skip(self._not_stored)

    def metadata(
        self, batch: CommonAttentionMetadata, seq_lens: Front, slots: Slots
    ) -> CommonAttentionMetadata:
        """The batch's metadata as this stage has it: fewer tokens, shorter rows, other slots.

        Args:
            batch: Of all tokens, with rows padded where a CUDA graph wants it.
            seq_lens: Receives the rows' lengths, int32.
            slots: As `write_slots` left them.
        """
        rows = len(self.plan.withdrawn)
        seen = CommonAttentionMetadata.__new__(CommonAttentionMetadata)
        vars(seen).update(vars(batch))  # `batch.replace` takes five times as long, in every step
        seen.seq_lens = seq_lens.view(batch.num_reqs)
        if rows == batch.num_reqs:
            torch.sub(batch.seq_lens, self.withdrawn, out=seen.seq_lens)
        else:
            torch.sub(batch.seq_lens[:rows], self.withdrawn, out=seen.seq_lens[:rows])
            seen.seq_lens[rows:] = 0
        assert batch.seq_lens_cpu_upper_bound is not None
        upper_bound = batch.seq_lens_cpu_upper_bound.numpy()[:rows] - self.plan.withdrawn
        seen.max_seq_len = int(upper_bound.max())
        if rows < batch.num_reqs:
            upper_bound = np.pad(upper_bound, (0, batch.num_reqs - rows))
        seen.seq_lens_cpu_upper_bound = torch.from_numpy(upper_bound)
        if self.query_start_loc is not None:
            assert batch.num_reqs == rows, "a step of a fixed shape gathers nothing"
            seen.query_start_loc = async_tensor_h2d(self.query_start_loc, batch.seq_lens.device)
            seen.query_start_loc_cpu = torch.from_numpy(self.query_start_loc)
            seen.num_actual_tokens = self.num_tokens
            seen.max_query_len = int(np.diff(self.query_start_loc).max())
        seen.slot_mapping = slots.view(seen.num_actual_tokens)
        # Rotary positions were applied before; what builders take from here would index the whole batch.
        seen.positions = None
        seen._num_computed_tokens_cache = seen._token_to_req_indices_cache = None
        return seen


def _gather(kept: np.ndarray, kept_before: np.ndarray, device: torch.device) -> torch.Tensor | None:
    if len(kept) == len(kept_before):
        return None
    return async_tensor_h2d(np.searchsorted(kept_before, kept), device)


class CurrentStep:
    """What the step being prepared, or run, means for each stage past the first.

    The runner's seam sets it before it builds attention metadata; builders and model read it after.

    Args:
        num_stages: Stages past the first.
        max_num_seqs: The most rows of a batch.
        device: Where the model runs.
    """

    def __init__(self, num_stages: int, max_num_seqs: int, device: torch.device) -> None:
        self.num_stages = num_stages
        self.device = device
        self.stages: Sequence[StageStep | None] = (None,) * num_stages
        """By stage past the first; None in a dummy run, which computes everything and stores nothing."""
        self.slots: dict[str, Slots] = {}
        """By layer name: the KV slots of the layer's tokens."""
        self.prompt_logprobs = False
        """Whether anything will be read from the rows of withdrawn tokens."""
        self._each_row = torch.arange(max_num_seqs, device=device)
        self._rows: Rows | None = None
        self._decoding: Rows | None = None
        """The rows of the step before, where all of them decoded: the next decode's plan is the same."""

    def begin(self, batch: Batch | None, fixed_shape: bool = False) -> None:
        """Starts a step over `batch`; None for a dummy run.

        Args:
            batch: The requests.
            fixed_shape: A CUDA graph of the whole model replays the step.
        """
        if batch is None:
            self.stages = (None,) * self.num_stages
            self.prompt_logprobs = False
            self._decoding = None
            return
        if batch.rows is self._decoding and batch.is_one_token_each and batch.is_settled:
            for stage in self.stages:
                assert stage is not None
                stage.begin_again()
            return
        if batch.rows is not self._rows:
            self._rows = batch.rows
            self._num_withdrawn = async_tensor_h2d(batch.rows.num_withdrawn, self.device)
        self.prompt_logprobs = batch.rows.prompt_logprobs
        if batch.is_one_token_each:
            token_rows = self._each_row[: len(batch.num_computed)]
        else:
            token_rows = async_tensor_h2d(batch.token_rows(), self.device)
        stages = []
        before: StagePlan | None = None
        for index in range(self.num_stages):
            plan = plan_stage(batch, index + 1)
            withdrawn = (
                self._num_withdrawn[index] if plan.settled else async_tensor_h2d(plan.withdrawn, self.device)
            )
            stages.append(StageStep(plan, before, withdrawn, token_rows, fixed_shape))
            before = plan
        self.stages = stages
        self._decoding = batch.rows if batch.is_one_token_each and batch.is_settled else None
