# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A ranking of visual tokens by how much a layer changes them."""

from typing import TYPE_CHECKING

from vllm_vtw.rankings.base import StateRanking

if TYPE_CHECKING:
    import torch


class Variation(StateRanking):
    """Scores tokens by the L2 norm of what the layer adds to their states: those that change most stay.

    This is the criterion of V2Drop (arXiv 2509.01552). It needs no attention scores.
    """

    def score(self, before: "torch.Tensor", after: "torch.Tensor") -> "torch.Tensor":
        return (after.float() - before.float()).norm(dim=-1)
