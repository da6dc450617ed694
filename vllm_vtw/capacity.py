# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How much KV cache requests take: how layers are split into groups, and how many tokens each stage holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from vllm_vtw.policy import Policy

MAX_GROUPS_PER_STAGE = 2
"""The limit for the average over a decoder's stages. Every group has block tables and attention metadata of
its own, which every step has to prepare."""
MAX_TEXT_SHARE = 1.05
"""The most memory that a request without images may take, as a share of stock vLLM's."""
TYPICAL_VISUAL, TYPICAL_TEXT, TYPICAL_BLOCK = 576, 96, 16
"""The request and the tokens of a block that groups are chosen for: an image of LLaVA-1.5, and a question
with its answer."""


def max_groups(num_stages: int) -> int:
    """The largest number of KV-cache groups that the layers of `num_stages` stages are split into."""
    return max(2, num_stages) * MAX_GROUPS_PER_STAGE


@cache
def pages_of_groups(layers: int, width: int, most: int) -> tuple[int, ...] | None:
    """Splits the layers of one stage into at most `most` groups.

    A block has memory for `width` layers. In a group of n layers, one block therefore holds `width // n`
    *pages*, each of them the keys and values of as many tokens as a block of stock vLLM.

    For example, 12 layers in blocks of 20 are best split into 10 layers with 2 pages and 2 layers with 10:
    tokens that fill ten pages take five blocks of the first group and one of the second, as much as in stock
    vLLM (6 * 20 = 10 * 12).

    Args:
        layers: The number of layers of the stage.
        width: The number of layers that a block has memory for.
        most: The largest number of groups.

    Returns:
        The pages of each group, ascending. A group with p pages has room for `width // p` layers. None if
        there have to be more groups.
    """
    if layers <= 0:
        return ()
    if most == 0:
        return None
    found = []
    # Of the numbers of pages that leave room for as many layers, the largest one.
    for pages in sorted({width // size for size in range(1, width + 1)}):
        rest = pages_of_groups(layers - width // pages, width, most - 1)
        if rest is not None:
            found.append(tuple(sorted((pages, *rest))))
    return min(found, key=lambda pages: (round(blocks_per_page(pages), 9), len(pages)), default=None)


def blocks_per_page(pages: Sequence[int]) -> float:
    """The number of blocks that groups take for the tokens of one page, without rounding up.

    Args:
        pages: The pages of a block, for each group.
    """
    return sum(1 / number for number in pages)


class LayerGroup(NamedTuple):
    """Layers that share block tables.

    Attributes:
        stage: The stage that the layers belong to.
        layers: The number of layers.
        pages: The number of KV pages of each layer that a block holds.
    """

    stage: int
    layers: int
    pages: int


@dataclass(frozen=True)
class LayerGroups:
    """The KV-cache groups that a decoder's layers are split into."""

    groups: tuple[LayerGroup, ...]

    @classmethod
    def of(cls, policy: Policy, num_hidden_layers: int) -> "LayerGroups":
        """The groups with which requests under a policy take the least memory.

        They are chosen for a request of LLaVA-1.5's lengths, among those with which a request without images
        takes little more than in stock vLLM. With gates, the exit that takes the most in comparison counts.
        """
        sizes = tuple(len(segment) for segment in policy.segments(num_hidden_layers))
        return _cheapest_groups(sizes, tuple(_possible_keeps(policy)))

    @property
    def width(self) -> int:
        """The number of layers that a block has memory for."""
        return max(group.layers for group in self.groups)

    def by_layer(self) -> list[LayerGroup]:
        """The group of each layer of the decoder.

        vLLM may distribute layers otherwise over the groups of a stage that have the same number of pages.
        """
        return [group for group in self.groups for _ in range(group.layers)]

    def layer_tokens(self, held: Sequence[float]) -> float:
        """The memory that a request takes, as a number of tokens of one layer, without rounding to blocks.

        For example, if one stage of 20 layers holds 100 tokens and another one of 12 layers holds 10, that
        is `20 * 100 + 12 * 10`, and more if the groups waste memory.

        Args:
            held: The number of the request's tokens that each stage holds.
        """
        return self.width * sum(held[group.stage] / group.pages for group in self.groups)

    @property
    def padding_fraction(self) -> float:
        """The fraction of the memory of a request without images that no layer uses."""
        layers = sum(group.layers for group in self.groups)
        return 1 - layers / self.layer_tokens([1] * len(self.groups))

    def takes_more_than_stock(self, policy: Policy) -> bool:
        """Whether requests take more memory than in stock vLLM, if half of all tokens are visual."""
        layers = sum(group.layers for group in self.groups)
        return self.layer_tokens([1 + keep for keep in policy.keeps]) > 2 * layers

    def blocks(self, held: Sequence[int], block_size: int) -> int:
        """The number of KV blocks that a request takes in all groups. A block has memory for `width` layers.

        Args:
            held: The number of the request's tokens that each stage holds.
            block_size: Tokens in a page.
        """
        return sum(-(-held[group.stage] // (block_size * group.pages)) for group in self.groups)


def _possible_keeps(policy: Policy) -> Iterator[tuple[float, ...]]:
    """The fractions of its visual tokens that the stages hold of a request, for each exit if there are gates."""
    if policy.gate is None:
        yield policy.keeps
        return
    stages = range(len(policy.keeps))
    for exit_stage in stages[1:]:
        yield tuple(float(stage < exit_stage) for stage in stages)


@cache
def _cheapest_groups(sizes: tuple[int, ...], cases: tuple[tuple[float, ...], ...]) -> LayerGroups:
    """As `LayerGroups.of`, for stages of so many layers that hold these fractions of the visual tokens."""
    text = (0.0,) * len(sizes)
    mean = tuple(sum(keeps) / len(cases) for keeps in zip(*cases, strict=True))
    candidates = {
        groups
        for width in range(1, max(sizes) + 1)
        for keeps in (mean, text)
        if (groups := _groups_of_width(sizes, keeps, width)) is not None
    }

    def ratio(groups: LayerGroups, keeps: Sequence[float]) -> float:
        """The memory of a request beside what its tokens need. Half a block of each group is lost."""
        held = [TYPICAL_TEXT + keep * TYPICAL_VISUAL for keep in keeps]
        lost = TYPICAL_BLOCK / 2
        needed = sum(size * (tokens + lost) for size, tokens in zip(sizes, held, strict=True))
        return (groups.layer_tokens(held) + len(groups.groups) * groups.width * lost) / needed

    def cost(groups: LayerGroups) -> tuple[float, float, int, float]:
        of_text = groups.layer_tokens([1] * len(sizes)) / sum(sizes)
        worst = max(ratio(groups, keeps) for keeps in cases)
        # A group takes time in every step, which less than a percent of the memory is not worth.
        return max(MAX_TEXT_SHARE, of_text), round(worst, 2), len(groups.groups), worst

    return min(candidates, key=cost)


def _groups_of_width(sizes: Sequence[int], keeps: Sequence[float], width: int) -> LayerGroups | None:
    """The cheapest groups if the widest one has `width` layers. None if there are none.

    Args:
        sizes: The number of layers of each stage.
        keeps: The fraction of visual tokens that each stage holds.
        width: The number of layers that a block has memory for.
    """
    most = max_groups(len(sizes))
    # By the number of groups used so far: the cost and the groups of the stages so far.
    least: dict[int, tuple[float, tuple[tuple[int, ...], ...]]] = {0: (0.0, ())}
    for size, keep in zip(sizes, keeps, strict=True):
        extended: dict[int, tuple[float, tuple[tuple[int, ...], ...]]] = {}
        for used, (cost, chosen) in least.items():
            for more in range(1, most - used + 1):
                pages = pages_of_groups(size, width, more)
                if pages is None or len(pages) < more:
                    continue
                held = TYPICAL_TEXT + keep * TYPICAL_VISUAL
                total = cost + blocks_per_page(pages) * held + more * TYPICAL_BLOCK / 2
                if total < extended.get(used + more, (float("inf"),))[0]:
                    extended[used + more] = total, (*chosen, pages)
        least = extended
    if not least:
        return None
    _, by_stage = min(least.values())
    groups = [
        LayerGroup(stage, *group)
        for stage, (size, pages) in enumerate(zip(sizes, by_stage, strict=True))
        for group in _fill(size, pages, width)
    ]
    split = LayerGroups(tuple(groups))
    return split if split.width == width else None


def _fill(layers: int, pages: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    """Distributes a stage's layers over groups with these `pages`, evenly over groups with the same number.

    Yields:
        The number of layers and the pages of each group.
    """
    for number in sorted(set(pages)):
        count = pages.count(number)
        taken = min(layers, count * (width // number))
        layers -= taken
        # As in vLLM, group i of n takes every n-th of these layers, from layer i on.
        yield from ((len(range(group, taken, count)), number) for group in range(count))


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
