# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""FastV's ranking of visual tokens, by the attention of the prompt's last token."""

from typing import TYPE_CHECKING

from vllm_vtw.rankings.base import AttentionRanking

if TYPE_CHECKING:
    import torch


class LastTokenAttention(AttentionRanking):
    """Scores tokens by the attention that the prompt's last token pays to them, summed over the heads.

    This is the criterion of FastV (arXiv 2403.06764), which takes the mean over the heads. The sum puts the
    tokens into the same order.
    """

    def score(self, query: "torch.Tensor", keys: "torch.Tensor", scale: float) -> "torch.Tensor":
        grouped = query.float().unflatten(0, (keys.shape[1], -1))
        products = grouped @ keys.float().permute(1, 2, 0)
        return (products * scale).softmax(-1).sum((0, 1))
