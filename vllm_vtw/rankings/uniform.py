# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A plain baseline: visual tokens on a regular grid."""

from functools import lru_cache
from math import isqrt

import numpy as np
import numpy.typing as npt

from vllm_vtw.rankings.base import ImageRanking

IntArray = npt.NDArray[np.int64]


class Uniform(ImageRanking):
    """Spreads the tokens that stay evenly over the image.

    If their number is a square, the tokens are taken for one, and ordered by the matrix of ordered dithering
    (Bayer, 1973). A quarter of an image of 24 by 24 tokens is every other token of every other row, a half is
    a checkerboard, and each number of them contains the smaller ones. Any other number of tokens is spread
    evenly along its sequence. Images of several tiles, of other proportions, and videos may be a square by
    number only; what stays of them is even, but not a grid.
    """

    def order(self, num_tokens: int, image_hash: str) -> IntArray:
        return _order(num_tokens)


@lru_cache(64)
def _order(num_tokens: int) -> IntArray:
    side = isqrt(num_tokens)
    if side * side == num_tokens:
        row, column = np.divmod(np.arange(num_tokens), side)
        places = _reversed_pairs(row ^ column, row)
    else:
        places = _reversed_pairs(np.arange(num_tokens), np.zeros(num_tokens, dtype=np.int64))
    return places.argsort(kind="stable")


def _reversed_pairs(high: IntArray, low: IntArray) -> IntArray:
    """Numbers whose digits are pairs of bits of `high` and `low`, those of the lowest bits first."""
    places = np.zeros_like(high)
    for bit in range(int(max(high.max(initial=0), low.max(initial=0))).bit_length()):
        places = places << 2 | (high >> bit & 1) << 1 | low >> bit & 1
    return places
