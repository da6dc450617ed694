"""The step at hand, shared by a worker's runner, attention builders and model."""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_vtw.worker.plan import Batch, Rows, StagePlan, plan_stage


class StageStep:
    """A stage's plan on the device.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, shape `(kept,)`; None for all.
        gather: Indices of the same tokens among those of the stage before; None when both compute the same.

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
        if plan.withdrawal is None:
            one_each = len(token_rows) == len(withdrawn)
            self.shifts = withdrawn if one_each else withdrawn[token_rows]
            return
        device = withdrawn.device
        self.shifts = async_tensor_h2d(plan.withdrawal.shifts, device)
        if fixed_shape:
            self._not_stored = async_tensor_h2d(plan.withdrawal.left, device)
            return
        self.kept = async_tensor_h2d(plan.withdrawal.kept, device)
        self.gather = self.kept
        if before is not None and before.withdrawal is not None:
            self.gather = _gather(plan.withdrawal.kept, before.withdrawal.kept, device)
        self.shifts = self.shifts[self.kept]
        self.token_rows = token_rows[self.kept]
        self.query_start_loc = plan.withdrawal.query_start_loc.astype(np.int32)

    def place(self, positions: torch.Tensor) -> None:
        """Settles the ranks of the stage's tokens.

        Args:
            positions: Of the tokens of the whole batch, shape `(at least tokens,)`.
        """
        if self._ranks is None:
            if self.kept is not None:
                positions = positions[self.kept]
            self._ranks = positions[: len(self.shifts)] - self.shifts

    def write_slots(self, block_table: torch.Tensor, block_size: int, slots: torch.Tensor) -> None:
        """Writes the KV slot of each of the stage's tokens to the front of `slots`, and pads the rest.

        Args:
            block_table: Of a KV-cache group, shape `(at least rows, blocks)`.
            block_size: Of that group.
            slots: Its buffer, int64, shape `(most tokens of a batch,)`.
        """
        ranks = self._ranks
        assert ranks is not None, "no group of this stage had its metadata built"
        blocks = block_table[self.token_rows, ranks // block_size]
        torch.add(ranks % block_size, blocks, alpha=block_size, out=slots[: len(ranks)])
        slots[len(ranks) :] = PAD_SLOT_ID
        if self._not_stored is not None:
            slots[self._not_stored] = PAD_SLOT_ID

    def metadata(
        self, batch: CommonAttentionMetadata, seq_lens: torch.Tensor, slots: torch.Tensor
    ) -> CommonAttentionMetadata:
        """The batch's metadata as this stage has it: fewer tokens, shorter rows, other slots.

        Args:
            batch: Of all tokens, with rows padded where a CUDA graph wants it.
            seq_lens: Receives the rows' lengths, int32, shape `(at least padded rows,)`.
            slots: As `write_slots` left it.
        """
        rows = len(self.plan.withdrawn)
        seq_lens = seq_lens[: batch.num_reqs]
        torch.sub(batch.seq_lens[:rows], self.withdrawn, out=seq_lens[:rows])
        seq_lens[rows:] = 0
        assert batch.seq_lens_cpu_upper_bound is not None
        upper_bound = batch.seq_lens_cpu_upper_bound.numpy().copy()
        upper_bound[:rows] -= self.plan.withdrawn
        of_kept = {}
        num_tokens = batch.num_actual_tokens
        if self.query_start_loc is not None:
            assert batch.num_reqs == rows, "a step of a fixed shape gathers nothing"
            num_tokens = int(self.query_start_loc[-1])
            of_kept = {
                "query_start_loc": async_tensor_h2d(self.query_start_loc, slots.device),
                "query_start_loc_cpu": torch.from_numpy(self.query_start_loc),
                "num_actual_tokens": num_tokens,
                "max_query_len": int(np.diff(self.query_start_loc).max()),
            }
        return batch.replace(
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(upper_bound),
            max_seq_len=int(upper_bound[:rows].max()),
            slot_mapping=slots[:num_tokens],
            # Rotary positions were applied before; what builders take from here would index the whole batch.
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
            **of_kept,
        )


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
        self.slots: dict[str, torch.Tensor] = {}
        """By layer name: the buffer with the KV slots of the layer's tokens, in which CUDA graphs look."""
        self.prompt_logprobs = False
        """Whether anything will be read from the rows of withdrawn tokens."""
        self._each_row = torch.arange(max_num_seqs, device=device)
        self._rows: Rows | None = None

    def begin(self, batch: Batch | None, fixed_shape: bool = False) -> None:
        """Starts a step over `batch`; None for a dummy run.

        Args:
            batch: The requests.
            fixed_shape: A CUDA graph of the whole model replays the step.
        """
        if batch is None:
            self.stages = (None,) * self.num_stages
            self.prompt_logprobs = False
            return
        if batch.rows is not self._rows:
            self._rows = batch.rows
            self._num_withdrawn = async_tensor_h2d(batch.rows.num_withdrawn, self.device)
        self.prompt_logprobs = batch.rows.prompt_logprobs
        if (batch.num_scheduled == 1).all():
            token_rows = self._each_row[: len(batch.num_scheduled)]
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
