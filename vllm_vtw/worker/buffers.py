"""Tensors of one KV-cache group that every step writes anew, where CUDA graphs look for them."""

import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID


class Front:
    """A tensor of which every step uses the front, mostly as much of it as the step before.

    Making a view, or asking a tensor for its length, costs as much as filling it with the numbers of a
    decode step.
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self._size, self._view = len(whole), whole

    def view(self, size: int) -> torch.Tensor:
        """The first `size` rows."""
        if size != self._size:
            self._size, self._view = size, self.whole[:size]
        return self._view


class Slots(Front):
    """The KV slots of a stage's tokens under the block table of one KV-cache group, int64.

    Behind the slots of the step's tokens the tensor says "do not write".
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        super().__init__(torch.full((max_tokens,), PAD_SLOT_ID, device=device))
        self._written = 0

    def write(
        self, count: int, rows: torch.Tensor, ranks: torch.Tensor, block_table: torch.Tensor, block_size: int
    ) -> None:
        """Writes the slots of `count` tokens at `ranks` of their `rows`.

        Args:
            count: Tokens.
            rows: Shape `(tokens,)`.
            ranks: Shape `(tokens,)`.
            block_table: Of the group, shape `(at least rows, blocks)`.
            block_size: Of the group.
        """
        blocks = block_table[rows, torch.floor_divide(ranks, block_size)]
        torch.add(ranks % block_size, blocks, alpha=block_size, out=self.view(count))
        self._pad(count)

    def skip(self, tokens: torch.Tensor) -> None:
        """Leaves out some of the tokens written, given by their indices."""
        self.whole[tokens] = PAD_SLOT_ID

    def clear(self) -> None:
        """Leaves out all of them."""
        self._pad(0)

    def _pad(self, count: int) -> None:
        if count < self._written:
            self.whole[count : self._written] = PAD_SLOT_ID
        self._written = count
