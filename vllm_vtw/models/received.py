"""What one pipeline rank hands to the next: the states of the tokens that the next one computes."""

import torch
from vllm.sequence import IntermediateTensors

EXIT_STATES = "exit_states"
"""States that withdrawn tokens left with; in steps where nothing is read from them, no rows."""
KEYS = ("hidden_states", "residual", EXIT_STATES)


class Received(torch.Tensor):
    """A buffer that takes as many rows as come.

    vLLM copies what a rank receives into rows of a buffer, a row for each token of the batch. A rank past
    the withdrawal layer is sent fewer; the rows behind them are left from before.
    """

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        rows = self.as_subclass(torch.Tensor)[: len(source)]
        rows.copy_(source, non_blocking=non_blocking)
        return self


def received_buffers(
    batch_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> IntermediateTensors:
    """The buffers of a rank for batches of up to `batch_size` tokens."""
    return IntermediateTensors(
        {
            key: torch.zeros(batch_size, hidden_size, dtype=dtype, device=device).as_subclass(Received)
            for key in KEYS
        }
    )


def received_rows(received: IntermediateTensors, key: str, rows: int) -> torch.Tensor:
    """The first `rows` rows of what has been received, shape `(rows, hidden_size)`."""
    return received[key].as_subclass(torch.Tensor)[:rows]
