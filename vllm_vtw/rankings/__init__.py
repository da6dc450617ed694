# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The rankings that decide which visual tokens a stage keeps, if it keeps only some of them.

To add a ranking, subclass one of the classes of `base` in a file of its own, and enter it here and in
`vllm_vtw.policy` under its name in policy files.
"""

from vllm_vtw.rankings.base import AttentionRanking, FeatureRanking, ImageRanking, StateRanking
from vllm_vtw.rankings.diversity import Diversity
from vllm_vtw.rankings.key_norm import KeyNorm
from vllm_vtw.rankings.last_token_attention import LastTokenAttention
from vllm_vtw.rankings.random import Random
from vllm_vtw.rankings.uniform import Uniform
from vllm_vtw.rankings.variation import Variation

ATTENTION_RANKINGS: dict[str, type[AttentionRanking]] = {
    "last-token-attention": LastTokenAttention,
    "key-norm": KeyNorm,
}
STATE_RANKINGS: dict[str, type[StateRanking]] = {"variation": Variation}
FEATURE_RANKINGS: dict[str, type[FeatureRanking]] = {"diversity": Diversity}
IMAGE_RANKINGS: dict[str, type[ImageRanking]] = {"uniform": Uniform, "random": Random}
"""The rankings, by their name in policy files."""

__all__ = [
    "ATTENTION_RANKINGS",
    "FEATURE_RANKINGS",
    "IMAGE_RANKINGS",
    "STATE_RANKINGS",
    "AttentionRanking",
    "FeatureRanking",
    "ImageRanking",
    "StateRanking",
]
