# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A ranking of visual tokens by how much they differ from each other."""

from typing import TYPE_CHECKING

from vllm_vtw.rankings.base import FeatureRanking

if TYPE_CHECKING:
    import torch

ROWS = 1024
"""How many tokens are compared with all others at a time. A video has tens of thousands."""


class Diversity(FeatureRanking):
    """Chooses tokens so that the smallest distance between two of them is large.

    This is the selection of DivPrune (arXiv 2503.02175), by cosine distance. The first token is the one that
    is farthest from its nearest other one. Then, one by one, follow the tokens that are farthest from the
    nearest of those chosen before. Among equals, the first one is chosen.

    Every token that is chosen takes a pass over all features, and the features are held once more, in
    float32. For a video of 30,000 tokens with 3,584 values each, these are 430 MB.
    """

    def order(self, features: "torch.Tensor", count: int) -> "torch.Tensor":
        norms = features.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        directions = features / norms
        chosen = directions.new_empty(count, dtype=int)
        nearest = directions.new_empty(len(directions))
        for start in range(0, len(directions) if count else 0, ROWS):
            distances = 1 - directions[start : start + ROWS] @ directions.T
            distances.diagonal(start).fill_(float("inf"))
            # Two tokens may be nearest to each other. Without rounding, noise would choose one of them.
            nearest[start : start + ROWS] = distances.amin(dim=1).round(decimals=5)
        for place in range(count):
            chosen[place] = nearest.argmax()
            latest = chosen[place : place + 1]
            distances = 1 - directions @ directions[latest][0]
            nearest = nearest.minimum(distances) if place else distances
            nearest[latest] = -float("inf")
        return chosen
