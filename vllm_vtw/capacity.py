# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How much KV cache requests take: how layers are split into groups, and how many tokens each stage holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_vtw.policy import Policy

MAX_GROUPS_PER_STAGE = 2
"""The limit for the average over a decoder's stages. Every group has block tables and attention metadata of
its own, which every step has to prepare."""


def max_groups(num_stages: int) -> int:
    """The largest number of KV-cache groups that the layers of `num_stages` stages are split into."""
    return max(2, num_stages) * MAX_GROUPS_PER_STAGE


def layers_per_group(stage_sizes: Sequence[int], keeps: Sequence[float]) -> int:
    """The number of layers in a KV-cache group with which requests with images take the least memory.

    vLLM gives all groups the same number of layers and pads the groups that have fewer. Padding costs more in
    shallow stages, where visual tokens take blocks too. Sizes are compared by the cost of a request with as
    many visual as text tokens. If two cost the same, the one that is cheaper without images wins.

    For example, if all visual tokens leave at layer 20 of 32, groups of 12 layers make two groups of stage 0
    (10 layers each, padded) and one of stage 1, and cost 12 * (2 + 2 + 1) = 60. Groups of 16 layers cost
    16 * (2 + 2 + 1) = 80.

    Args:
        stage_sizes: The number of layers of each stage.
        keeps: The fraction of visual tokens that each stage holds.
    """
    counts = {size: [-(-layers // size) for layers in stage_sizes] for size in range(1, max(stage_sizes) + 1)}

    def cost(size: int) -> tuple[float, int, int]:
        groups = sum(counts[size])
        held = sum(count * (1 + keep) for count, keep in zip(counts[size], keeps, strict=True))
        return size * held, size * groups, groups

    most = max_groups(len(stage_sizes))
    return min((size for size in counts if sum(counts[size]) <= most), key=cost)


@dataclass(frozen=True)
class LayerGroups:
    """The KV-cache groups that a decoder's layers are split into.

    Attributes:
        stages: The stage of each group.
        layers: The number of layers in each group, without padding.
    """

    stages: tuple[int, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, policy: Policy, num_hidden_layers: int) -> "LayerGroups":
        """The groups under a policy."""
        sizes = [len(segment) for segment in policy.segments(num_hidden_layers)]
        width = layers_per_group(sizes, policy.keeps)
        # As in vLLM, group i of a stage's n groups takes every n-th of the stage's layers, from layer i on.
        split = [
            (stage, len(range(group, size, -(-size // width))))
            for stage, size in enumerate(sizes)
            for group in range(-(-size // width))
        ]
        stages, layers = zip(*split, strict=True)
        return cls(stages, layers)

    @property
    def width(self) -> int:
        """The number of layers that each group takes memory for, padding included."""
        return max(self.layers)

    @property
    def padding_fraction(self) -> float:
        """The fraction of the memory that is padding."""
        return 1 - sum(self.layers) / (self.width * len(self.layers))

    def takes_more_than_stock(self, policy: Policy) -> bool:
        """Whether padding takes more memory than withdrawal saves, if half of all tokens are visual."""
        return self.width * sum(1 + policy.keeps[stage] for stage in self.stages) > 2 * sum(self.layers)

    def blocks(self, held: Sequence[int], block_size: int) -> int:
        """The number of KV blocks that a request takes in all groups. A block has memory for `width` layers.

        Args:
            held: The number of the request's tokens that each stage holds.
            block_size: Tokens in a block.
        """
        return sum(-(-held[stage] // block_size) for stage in self.stages)


def visual_tokens_held(
    policy: Policy, images: int, tokens_per_image: int, align_to: int, exit_stage: int | None = 1
) -> list[int]:
    """The largest number of visual tokens that each stage holds of a request.

    There has to be text before and after each image.

    Args:
        policy: What is withdrawn.
        images: The number of images in the request.
        tokens_per_image: The number of visual tokens of an image.
        align_to: 1 to withdraw every visual token, the KV block size to withdraw whole blocks.
        exit_stage: Under a policy with gates, the first stage without the visual tokens. None if they stay.

    Returns:
        One number for each stage, starting with stage 0.
    """
    everything = images * tokens_per_image
    if policy.ranking is not None:
        return [everything, *(stage.kept(everything) for stage in policy.stages)]
    left = images * (tokens_per_image - withdrawn_per_image(tokens_per_image, align_to))
    return [
        everything if exit_stage is None or stage < exit_stage else left
        for stage in range(len(policy.stages) + 1)
    ]


def withdrawn_per_image(tokens: int, align_to: int) -> int:
    """The smallest number of visual tokens that are withdrawn of an image, at whatever position it begins.

    There has to be text before and after the image. The blocks at its ends may contain text, and then stay:
    with `align_to=16`, at least 560 of an image's 576 tokens are withdrawn.

    Args:
        tokens: The number of visual tokens of the image.
        align_to: 1 to withdraw every visual token, the KV block size to withdraw whole blocks.
    """
    return max(0, (tokens - align_to + 1) // align_to) * align_to
