"""The step at hand, shared by a worker's runner, attention builders and model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_vtw.worker.plan import Batch, StagePlan, plan_stage


@dataclass(frozen=True)
class StageStep:
    """A stage's plan on the device.

    Attributes:
        gather: Indices of this stage's tokens among those of the stage before, shape `(tokens,)`; None when
            both compute the same.
    """

    gather: torch.Tensor | None
    rows: torch.Tensor
    ranks: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens_cpu: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of(cls, plan: StagePlan, before: StagePlan | None, device: torch.device) -> "StageStep":
        query_start_loc = torch.from_numpy(plan.query_start_loc.astype(np.int32))
        seq_lens = torch.from_numpy(plan.seq_lens.astype(np.int32))

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        gather = _gather(plan, before)
        return cls(
            gather=None if gather is None else on_device(gather),
            rows=on_device(plan.rows),
            ranks=on_device(plan.ranks),
            query_start_loc_cpu=query_start_loc,
            query_start_loc=query_start_loc.to(device, non_blocking=True),
            seq_lens_cpu=seq_lens,
            seq_lens=seq_lens.to(device, non_blocking=True),
            max_query_len=int(np.diff(plan.query_start_loc).max()),
            max_seq_len=int(plan.seq_lens.max()),
        )

    def slot_mapping(self, block_table: torch.Tensor, block_size: int) -> torch.Tensor:
        """The KV slot of each token under a group's block table, shape `(tokens,)`, int64."""
        blocks = block_table[self.rows, self.ranks // block_size].long()
        return blocks * block_size + self.ranks % block_size

    def metadata(self, batch: CommonAttentionMetadata, slot_mapping: torch.Tensor) -> CommonAttentionMetadata:
        """The batch's metadata as this stage has it: fewer tokens, shorter rows, other slots."""
        assert batch.num_reqs == len(self.seq_lens), "padded batches are CUDA graphs, refused at start-up"
        return batch.replace(
            query_start_loc=self.query_start_loc,
            query_start_loc_cpu=self.query_start_loc_cpu,
            seq_lens=self.seq_lens,
            seq_lens_cpu_upper_bound=self.seq_lens_cpu,
            num_actual_tokens=len(self.ranks),
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            slot_mapping=slot_mapping,
            # Rotary positions were applied before; what builders take from here would index the whole batch.
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


def _gather(plan: StagePlan, before: StagePlan | None) -> np.ndarray | None:
    if plan.kept is None or before is None or before.kept is None:
        return plan.kept
    if len(plan.kept) == len(before.kept):
        return None
    return np.searchsorted(before.kept, plan.kept)


class CurrentStep:
    """What the step being prepared, or run, means for each stage past the first.

    The runner's seam sets it before it builds attention metadata; builders and model read it after.
    """

    def __init__(self, num_stages: int, device: torch.device) -> None:
        self.num_stages = num_stages
        self.device = device
        self.stages: Sequence[StageStep | None] = (None,) * num_stages
        """By stage past the first; None where it computes and stores what a stock layer would."""
        self.slot_mappings: dict[str, torch.Tensor] = {}
        """By layer name, for the layers whose slots are not the runner's."""

    def begin(self, batch: Batch | None) -> None:
        """Starts a step over `batch`; None for a dummy run, in which every stage computes everything."""
        self.slot_mappings.clear()
        stages: list[StageStep | None] = [None] * self.num_stages
        if batch is not None:
            before: StagePlan | None = None
            for index in range(self.num_stages):
                plan = plan_stage(batch, index + 1)
                if plan is not None:
                    stages[index] = StageStep.of(plan, before, self.device)
                    before = plan
        self.stages = stages
