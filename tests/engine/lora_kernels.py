# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stands in for vLLM's LoRA kernels for GPUs, which take no float32: plain products, from the same tensors.

Like a kernel in a CUDA graph, they look at the tensors only, not at the flag that a batch has no adapters.
"""

from collections.abc import Iterator

import torch
from vllm.lora.punica_wrapper import punica_gpu
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import direct_register_custom_op


def _groups(
    rows_by_adapter: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor, adapters: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Every adapter of the batch, with the rows that use it."""
    for group, adapter in enumerate(adapters.tolist()):
        start = int(starts[group])
        if adapter >= 0:
            yield adapter, rows_by_adapter[start : start + int(counts[group])]


def shrink(
    inputs: torch.Tensor,
    weights: list[torch.Tensor],
    output: torch.Tensor,
    mapping: torch.Tensor,
    rows_by_adapter: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    adapters: torch.Tensor,
    no_lora: torch.Tensor,
    num_active: torch.Tensor,
    scaling: float,
) -> None:
    output.zero_()
    for adapter, rows in _groups(rows_by_adapter, counts, starts, adapters):
        for piece, weight in enumerate(weights):
            output[piece, rows] = scaling * inputs[rows].float() @ weight[adapter, 0].float().T


def expand(
    inputs: torch.Tensor,
    weights: list[torch.Tensor],
    output: torch.Tensor,
    mapping: torch.Tensor,
    rows_by_adapter: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    adapters: torch.Tensor,
    no_lora: torch.Tensor,
    num_active: torch.Tensor,
    offset_start: int = 0,
    add_inputs: bool = True,
) -> None:
    assert add_inputs
    for adapter, rows in _groups(rows_by_adapter, counts, starts, adapters):
        first = offset_start
        for piece, weight in enumerate(weights):
            last = first + weight.shape[-2]
            output[rows, first:last] += (inputs[piece, rows] @ weight[adapter, 0].float().T).to(output.dtype)
            first = last


for name, function in (("shrink", shrink), ("expand", expand)):
    direct_register_custom_op(f"plain_lora_{name}", function, mutates_args=["output"])
    setattr(punica_gpu, f"lora_{name}", getattr(torch.ops.vllm, f"plain_lora_{name}"))
CpuPlatform.get_punica_wrapper = classmethod(lambda cls: f"{punica_gpu.__name__}.PunicaWrapperGPU")
