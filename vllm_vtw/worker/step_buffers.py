# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tensors of one KV-cache group that every step writes anew, at addresses that CUDA graphs remember."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.block_table import ComputeSlotMappingKernel

NO_CONTEXT_PARALLELISM = (1, 0, 1)


class StepBuffer:
    """A tensor that lives as long as the engine. Each step uses as many of its first rows as it needs.

    The view of the step before is kept, as most steps use as many rows. Making a view, or asking a tensor
    for its length, costs as much as filling it with the numbers of a decode step.
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self._size, self._view = len(whole), whole

    def view(self, size: int) -> torch.Tensor:
        """The first `size` rows."""
        if size != self._size:
            self._size, self._view = size, self.whole[:size]
        return self._view


class SlotMapping(StepBuffer):
    """The KV slots of a stage's tokens under the block table of one KV-cache group, int64.

    Behind the slots of the step's tokens, every entry is `PAD_SLOT_ID`: "do not write".
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        super().__init__(torch.full((max_tokens,), PAD_SLOT_ID, device=device))
        self._written = 0

    def write(
        self,
        count: int,
        starts: torch.Tensor,
        ranks: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
    ) -> None:
        """Writes the slots of tokens, given their ranks.

        Args:
            count: The number of tokens.
            starts: Where each row's tokens start, followed by their number, int32, shape `(rows + 1,)`.
            ranks: Rank of each token in its row, int64, shape `(count,)`.
            block_table: The group's block table, int32, shape `(rows, blocks)`.
            block_size: Tokens of a block of the group.
        """
        # vLLM's own launcher takes three times as long as the kernel. The kernel is not asked to pad, as it
        # would do so up to the end of the tensor in every step, and on the CPU not at all.
        ComputeSlotMappingKernel.kernel[(starts.shape[0],)](
            count,
            count,
            starts,
            ranks,
            block_table,
            block_table.stride(0),
            self.whole,
            block_size,
            *NO_CONTEXT_PARALLELISM,
            PAD_SLOT_ID,
            ComputeSlotMappingKernel.triton_block_size,
        )
        self._pad(count)

    def skip(self, tokens: torch.Tensor) -> None:
        """Marks some of the written tokens as not to be stored, given their indices."""
        self.whole[tokens] = PAD_SLOT_ID

    def clear(self, batch: CommonAttentionMetadata, block_table: torch.Tensor, block_size: int) -> None:
        """Marks all tokens as not to be stored.

        It calls the kernel all the same, so that a dummy run compiles the kernel before a request comes.
        """
        assert batch.positions is not None
        self.write(0, batch.query_start_loc[:1], batch.positions, block_table, block_size)

    def _pad(self, count: int) -> None:
        if count < self._written:
            self.whole[count : self._written] = PAD_SLOT_ID
        self._written = count
