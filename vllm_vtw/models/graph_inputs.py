"""Inputs of segments that CUDA graphs replay piece by piece."""

from bisect import bisect_left

import torch
from torch import nn
from vllm.config import VllmConfig


class GraphInputs(nn.Module):
    """Where a segment past the first finds its inputs: a graph reads where they were when it was captured.

    The segments share the buffers, as one is done with its inputs before the next one's are written. Rows
    behind a step's own keep what was there, and a graph computes them too. So they have to outlast a sleep of
    the engine: vLLM keeps a model's registered buffers then, and may drop all else that was made with the
    weights.
    """

    positions: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__()
        self.compilation = vllm_config.compilation_config
        rows = 0
        # The runner may still turn FULL into FULL_AND_PIECEWISE, when it knows its attention backends.
        if self.compilation.cudagraph_mode and self.compilation.cudagraph_capture_sizes:
            rows = max(self.compilation.cudagraph_capture_sizes)
        model = vllm_config.model_config
        states = torch.zeros(rows, model.get_hidden_size(), dtype=model.dtype, device=device)
        positions = torch.zeros(rows, dtype=torch.int64, device=device)
        for name, buffer in (("positions", positions), ("hidden", states), ("residual", states.clone())):
            self.register_buffer(name, buffer, persistent=False)

    def _sizes(self) -> list[int]:
        """The captured token counts, ascending."""
        mode = self.compilation.cudagraph_mode
        if mode is None or not mode.has_piecewise_cudagraphs():
            return []
        return sorted(self.compilation.cudagraph_capture_sizes or [])

    def size(self, rows: int) -> int | None:
        """The token count of the smallest graph for `rows` rows; None where no graph is large enough."""
        sizes = self._sizes()
        index = bisect_left(sizes, rows)
        return sizes[index] if index < len(sizes) else None

    def write(
        self, size: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies a segment's inputs; returns `size` rows of the buffers, the last of them from before."""
        rows = len(hidden)
        self.positions[:rows].copy_(positions)
        self.hidden[:rows].copy_(hidden)
        self.residual[:rows].copy_(residual)
        return self.positions[:size], self.hidden[:size], self.residual[:size]
