# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The Muon optimiser, for the matrices of hidden layers."""

from collections import defaultdict
from collections.abc import Iterable

import torch

MOMENTUM, ITERATIONS = 0.95, 5
# The coefficients of the polynomial that brings all singular values near 1.
A, B, C = 3.4445, -4.775, 2.0315


class Muon(torch.optim.Optimizer):
    """SGD with momentum and orthogonal updates (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon).

    `torch.optim.Muon` computes in bfloat16, one matrix at a time, which is slow on a CPU without bfloat16.
    This class computes in the parameters' data type, and all matrices of the same shape at once.

    Args:
        matrices: The parameters, each with two dimensions.
        lr: The learning rate. It is multiplied by 0.2 times the square root of a matrix's longer side, so
            that the rates of AdamW fit (arXiv 2502.16982).
        weight_decay: The weight decay, which is decoupled as in AdamW.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(matrix) for matrix in matrices]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)

    def _momentum(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        """Updates the momentum of a matrix by its gradient, and returns Nesterov's momentum."""
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Makes matrices nearly orthogonal: U S V^T, the singular value decomposition, becomes about U V^T.

    Args:
        matrices: The matrices, shape `(matrices, rows, columns)`.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    near = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = near @ near.mT
        near = A * near + (B * gram + C * gram @ gram) @ near
    return near
