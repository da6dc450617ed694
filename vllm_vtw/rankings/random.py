# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A plain baseline: visual tokens that are drawn by lot."""

from hashlib import sha256

import numpy as np
import numpy.typing as npt

from vllm_vtw.rankings.base import ImageRanking


class Random(ImageRanking):
    """Puts the tokens into an order that is drawn by lot, and is the same whenever the image is asked about.

    Random selection is ahead of several published methods (UniPruneBench, arXiv 2511.02650). The seed is the
    image's hash in vLLM. That is one of its content, unless a request gives the image a UUID, which takes its
    place. If both prefix caching and the cache of processed images are switched off, vLLM hashes nothing, and
    every request draws anew.
    """

    def order(self, num_tokens: int, image_hash: str) -> npt.NDArray[np.int64]:
        seed = int.from_bytes(sha256(image_hash.encode()).digest())
        return np.random.default_rng(seed).permutation(num_tokens)
