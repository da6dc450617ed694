# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The buffers from which piecewise CUDA graphs read the inputs of a segment."""

from bisect import bisect_left

import torch
from torch import nn
from vllm.config import VllmConfig


class GraphInputs(nn.Module):
    """Holds the inputs of segments past the first at fixed addresses.

    A CUDA graph always reads from the memory that it read from when it was captured. All segments share the
    buffers, as a segment has read its inputs before those of the next segment are written.

    A graph also computes the rows after those of the step, which still hold the inputs of earlier steps. The
    content therefore has to survive when the engine sleeps. vLLM keeps a model's registered buffers then, and
    may drop everything else that was allocated together with the weights.

    Args:
        vllm_config: vLLM's configuration.
        device: Where the model runs.
    """

    positions: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__()
        self.compilation = vllm_config.compilation_config
        rows = 0
        # In any mode with graphs: the runner may still change FULL to FULL_AND_PIECEWISE, once it knows the
        # attention backends.
        if self.compilation.cudagraph_mode and self.compilation.cudagraph_capture_sizes:
            rows = max(self.compilation.cudagraph_capture_sizes)
        model = vllm_config.model_config
        states = torch.zeros(rows, model.get_hidden_size(), dtype=model.dtype, device=device)
        positions = torch.zeros(rows, dtype=torch.int64, device=device)
        for name, buffer in (("positions", positions), ("hidden", states), ("residual", states.clone())):
            self.register_buffer(name, buffer, persistent=False)

    def _sizes(self) -> list[int]:
        """The numbers of tokens that piecewise graphs are captured for, ascending."""
        mode = self.compilation.cudagraph_mode
        if mode is None or not mode.has_piecewise_cudagraphs():
            return []
        return sorted(self.compilation.cudagraph_capture_sizes or [])

    def size(self, rows: int) -> int | None:
        """The number of tokens of the smallest graph for `rows` rows. None if no graph is large enough."""
        sizes = self._sizes()
        index = bisect_left(sizes, rows)
        return sizes[index] if index < len(sizes) else None

    def write(
        self, size: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies a segment's inputs into the buffers.

        Args:
            size: The number of tokens of the graph that will run, at least the number of rows.
            positions: Position ids, shape `(rows,)`.
            hidden: Hidden states, shape `(rows, hidden_size)`.
            residual: The residual stream, same shape.

        Returns:
            The first `size` rows of the three buffers.
        """
        rows = len(hidden)
        self.positions[:rows].copy_(positions)
        self.hidden[:rows].copy_(hidden)
        self.residual[:rows].copy_(residual)
        return self.positions[:size], self.hidden[:size], self.residual[:size]
