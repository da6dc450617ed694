# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A ranking of visual tokens by the norm of their keys."""

from typing import TYPE_CHECKING

from vllm_vtw.rankings.base import AttentionRanking

if TYPE_CHECKING:
    import torch


class KeyNorm(AttentionRanking):
    """Scores tokens by the L2 norm of their keys, summed over the heads: those with small norms stay.

    Keys with small norms get much attention (arXiv 2406.11430).
    """

    def score(self, query: "torch.Tensor", keys: "torch.Tensor", scale: float) -> "torch.Tensor":
        return -keys.float().norm(dim=-1).sum(1)
