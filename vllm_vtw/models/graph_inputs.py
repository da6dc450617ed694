# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The buffers from which compiled segments and their CUDA graphs read their inputs."""

from bisect import bisect_left
from dataclasses import replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import BatchDescriptor


class GraphInputs(nn.Module):
    """Holds the inputs of segments past the first at fixed addresses.

    A CUDA graph always reads from the memory that it read from when it was captured. All segments share the
    buffers, as a segment has read its inputs before those of the next segment are written.

    A graph also computes the rows after those of the step, which still hold the inputs of earlier steps. The
    content therefore has to survive when the engine sleeps. vLLM keeps a model's registered buffers then, and
    may drop everything else that was allocated together with the weights.

    Positions of M-RoPE have several rows, and slices of vLLM's buffer of them are never contiguous. Code that
    was compiled for such slices would read others wrongly, as it does not check strides. Here, positions
    therefore have a buffer with as many columns, through which every step of a segment past the first goes.

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
        lora = vllm_config.lora_config
        # All runners capture graphs for as many LoRA adapters as a batch may have, and tokens without one.
        self.most_adapters = BatchDescriptor(
            num_tokens=0, has_lora=lora is not None, num_active_loras=lora.max_loras + 1 if lora else 0
        )
        model = vllm_config.model_config
        states = torch.zeros(rows, model.get_hidden_size(), dtype=model.dtype, device=device)
        shape: tuple[int, ...] = (rows,)
        self.uses_mrope = model.uses_mrope
        if self.uses_mrope:
            shape = model.mrope_num_dims, vllm_config.scheduler_config.max_num_batched_tokens + 1
        positions = torch.zeros(shape, dtype=torch.int64, device=device)
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

    def descriptor(self, size: int, of_batch: BatchDescriptor | None) -> BatchDescriptor:
        """Which graph of `size` tokens a segment runs.

        Args:
            size: The number of tokens of the graph.
            of_batch: Which piecewise graph the runner has chosen for the whole batch, by its LoRA adapters,
                too. None if it has chosen none.
        """
        return replace(of_batch or self.most_adapters, num_tokens=size)

    def write(
        self, size: int, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Copies a segment's inputs into the buffers.

        Args:
            size: The number of tokens of the graph that will run, at least the number of rows.
            positions: Position ids, shape `(rows,)`, or `(dims, rows)` with M-RoPE.
            hidden: Hidden states, shape `(rows, hidden_size)`.
            residual: The residual stream, same shape. None before layer 0.

        Returns:
            Positions, hidden states and residual of `size` tokens, in the buffers.
        """
        rows = len(hidden)
        self.hidden[:rows].copy_(hidden)
        if residual is not None:
            self.residual[:rows].copy_(residual)
            residual = self.residual[:size]
        return self.write_positions(size, positions), self.hidden[:size], residual

    def write_positions(self, size: int, positions: torch.Tensor) -> torch.Tensor:
        """Copies positions into their buffer, and returns those of the first `size` tokens there."""
        self.positions[..., : positions.shape[-1]].copy_(positions)
        return self.positions[..., :size]
