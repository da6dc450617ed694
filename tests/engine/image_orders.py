# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The orders by which images lose their tokens under rankings by image alone, written down once more."""

from hashlib import sha256

import numpy as np
import torch


def dithered(side: int) -> list[int]:
    """The tokens of a square by the matrix of ordered dithering, which is made of itself four times."""
    matrix = np.zeros((1, 1), dtype=int)
    while len(matrix) < side:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    cells = [(int(matrix[row, column]), row * side + column) for row in range(side) for column in range(side)]
    return [token for _, token in sorted(cells)]


def spread(tokens: int) -> list[int]:
    """The tokens of an image or video so that the first ones are spread evenly."""
    side = round(tokens**0.5)
    if side * side == tokens:
        return dithered(side)
    digits = len(bin(tokens))
    return sorted(range(tokens), key=lambda token: int(f"{token:0{digits}b}"[::-1], 2))


def drawn(tokens: int, image_hash: str) -> list[int]:
    """The tokens of an image by lot."""
    seed = int(sha256(image_hash.encode()).hexdigest(), 16)
    return np.random.default_rng(seed).permutation(tokens).tolist()


def diverse(features: torch.Tensor) -> list[int]:
    """The tokens of an image so that each is as far as can be from those before, by the cosine.

    Args:
        features: What the decoder gets in place of the tokens, shape `(tokens, hidden_size)`.
    """
    distances = 1 - torch.cosine_similarity(features[:, None].float(), features[None].float(), dim=-1)
    # Two tokens may be nearest to each other, and as far apart as any: the first one is meant.
    apart = [round(sorted(row)[1], 5) for row in distances.tolist()]
    order = [apart.index(max(apart))]
    while len(order) < len(features):
        nearest = distances[:, order].min(dim=1).values
        nearest[order] = -1
        order.append(int(nearest.argmax()))
    return order
