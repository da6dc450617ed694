# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How much KV cache requests take: how layers are split into groups, and how many tokens each stage holds."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

from vllm_vtw.policy import BY_IMAGE, Policy

MAX_GROUPS_PER_STAGE = 2
"""The limit for the average over a decoder's stages. Every group has block tables and attention metadata of
its own, which every step has to prepare."""
MAX_SHARE = 1.05
"""The most memory that a request may take, as a share of what its tokens need. Groups with which it takes
more are chosen only if there are no others."""
TYPICAL_VISUAL, TYPICAL_TEXT, TYPICAL_BLOCK = 576, 96, 16
"""The request and the tokens of a block that groups are chosen for: an image of LLaVA-1.5, and a question
with its answer."""

GROUP_SHARE = 0.015
"""How much more memory a request may take to save a group, as a share of what its tokens need. A group takes
time in every step."""
CACHED_POLICIES = 4096
"""The number of policies whose groups are remembered. A search asks for thousands of them."""


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
        rank: The pipeline rank that has the layers.
    """

    stage: int
    layers: int
    pages: int
    rank: int = 0


@dataclass(frozen=True)
class LayerGroups:
    """The KV-cache groups that a decoder's layers are split into.

    Pipeline ranks have groups and blocks of their own, and equally many blocks.

    Attributes:
        groups: The groups.
        drafter_layers: The number of layers of a drafter for speculative decoding, which hold all tokens.
            They are in the first group, together with layers of the decoder.
    """

    groups: tuple[LayerGroup, ...]
    drafter_layers: int = 0

    @classmethod
    def of(
        cls,
        policy: Policy,
        num_hidden_layers: int,
        rank_layers: Sequence[range] | None = None,
        drafter_layers: int = 0,
    ) -> "LayerGroups":
        """The groups with which requests under a policy take little memory, and as few groups as that allows.

        They are chosen for a request of LLaVA-1.5's lengths, among those with which a request without images
        takes little more than in stock vLLM. If requests have exits of their own, the exit that takes the
        most in comparison counts.

        Args:
            policy: What is withdrawn.
            num_hidden_layers: The number of decoder layers.
            rank_layers: The layers of each pipeline rank. None if one rank has all of them.
            drafter_layers: The number of a drafter's layers. With several pipeline ranks, it has to be 0.

        Raises:
            ValueError: With these stages, there are no groups for the drafter's layers.
        """
        segments = policy.segments(num_hidden_layers)
        ranks = rank_layers or [range(num_hidden_layers)]
        sizes = [[len(_overlap(segment, layers)) for segment in segments] for layers in ranks]
        sizes[0][0] += drafter_layers
        return _cheapest_groups(tuple(map(tuple, sizes)), tuple(_possible_keeps(policy)), drafter_layers)

    @property
    def ranks(self) -> range:
        """The pipeline ranks."""
        return range(self.groups[-1].rank + 1)

    @property
    def width(self) -> int:
        """The number of layers that a block has memory for, on the pipeline rank with the widest blocks."""
        return max(map(self.width_of, self.ranks))

    def width_of(self, rank: int) -> int:
        """The number of layers that a block of a pipeline rank has memory for."""
        return max(group.layers for group in self.groups if group.rank == rank)

    def by_layer(self) -> list[LayerGroup]:
        """The group of each layer of the decoder.

        vLLM may distribute layers otherwise over the groups of a stage that have the same number of pages.
        """
        return [group for group in self.groups for _ in range(group.layers)][self.drafter_layers :]

    def layer_tokens(self, held: Sequence[float]) -> float:
        """The memory that a request takes, as a number of tokens of one layer, without rounding to blocks.

        For example, if one stage of 20 layers holds 100 tokens and another one of 12 layers holds 10, that
        is `20 * 100 + 12 * 10`, and more if the groups waste memory. With pipeline parallelism, requests
        take as much on every rank as on the rank where they need the most.

        Args:
            held: The number of the request's tokens that each stage holds.
        """
        return len(self.ranks) * self.width * max(self.rank_tokens(held))

    def rank_tokens(self, held: Sequence[float]) -> list[float]:
        """The blocks that a request takes on each pipeline rank, times the tokens of a page, not rounded.

        Args:
            held: The number of the request's tokens that each stage holds.
        """
        return [
            sum(held[group.stage] / group.pages for group in self.groups if group.rank == rank)
            for rank in self.ranks
        ]

    @property
    def num_layers(self) -> int:
        """The number of the layers of the decoder and of a drafter."""
        return sum(group.layers for group in self.groups)

    @property
    def can_hold_drafter(self) -> bool:
        """Whether vLLM finds a drafter's blocks.

        It addresses them by itself, as blocks of one page each, and all of them in one group. Some drafters
        look for them in the first group, which is that of the decoder's layer 0.
        """
        as_in_stock = [group for group in self.groups if (group.stage, group.pages) == (0, 1)]
        return len(as_in_stock) == 1 and as_in_stock[0].layers > self.drafter_layers

    @property
    def most_groups(self) -> int:
        """The number of groups on the pipeline rank that has the most."""
        return max(Counter(group.rank for group in self.groups).values())

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return 1 + max(group.stage for group in self.groups)

    @property
    def padding_fraction(self) -> float:
        """The fraction of the memory of a request without images that no layer uses."""
        return 1 - self.num_layers / self.layer_tokens([1] * self.num_stages)

    def saves_nothing(self, policy: Policy) -> bool:
        """Whether requests take no less memory than in stock vLLM, if half of all tokens are visual."""
        return self.layer_tokens([1 + keep for keep in policy.keeps]) >= 2 * self.num_layers

    def blocks(self, held: Sequence[int], block_size: int) -> int:
        """The number of KV blocks that a request takes on the pipeline rank where it takes the most.

        Args:
            held: The number of the request's tokens that each stage holds.
            block_size: Tokens in a page.
        """
        taken = [0] * len(self.ranks)
        for group in self.groups:
            taken[group.rank] += -(-held[group.stage] // (block_size * group.pages))
        return max(taken)


def best_partition(
    policy: Policy, num_hidden_layers: int, num_ranks: int, held: Sequence[float]
) -> list[range]:
    """The split of layers over pipeline ranks with which a request takes the least memory.

    Splits are considered that cut the layers in two and spread either part evenly over some of the ranks.
    For example, two ranks can have 8 and 24 layers.

    Args:
        policy: What is withdrawn.
        num_hidden_layers: The number of decoder layers.
        num_ranks: The number of pipeline ranks.
        held: The number of the request's tokens that each stage holds.
    """
    splits = [_evenly(range(num_hidden_layers), num_ranks)]
    splits += [
        [*_evenly(range(cut), first), *_evenly(range(cut, num_hidden_layers), num_ranks - first)]
        for cut in range(1, num_hidden_layers)
        for first in range(1, num_ranks)
        if cut >= first and num_hidden_layers - cut >= num_ranks - first
    ]
    return min(splits, key=lambda split: LayerGroups.of(policy, num_hidden_layers, split).layer_tokens(held))


def _evenly(layers: range, parts: int) -> list[range]:
    borders = [layers.start + len(layers) * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _possible_keeps(policy: Policy) -> Iterator[tuple[float, ...]]:
    """The fractions of its visual tokens that stages hold of a request, for each exit that it may have."""
    if not policy.has_exits:
        yield policy.keeps
        return
    stages = range(len(policy.keeps))
    for exit_stage in stages[1:]:
        yield tuple(float(stage < exit_stage) for stage in stages)


@lru_cache(CACHED_POLICIES)
def _cheapest_groups(
    ranks: tuple[tuple[int, ...], ...], cases: tuple[tuple[float, ...], ...], drafter_layers: int
) -> LayerGroups:
    """As `LayerGroups.of`.

    Args:
        ranks: For each pipeline rank, the number of its layers in each stage. Those of a drafter are in stage
            0 of the first rank.
        cases: The fractions of visual tokens that stages may hold of a request.
        drafter_layers: The number of a drafter's layers.
    """
    widest = max(map(sum, ranks))
    text = (0.0,) * len(ranks[0])
    mean = tuple(sum(keeps) / len(cases) for keeps in zip(*cases, strict=True))
    candidates = set()
    for width in range(1, max(map(max, ranks)) + 1):
        for keeps in (mean, text):
            by_rank = [_groups_of_rank(sizes, keeps, width) for sizes in ranks]
            if None not in by_rank:
                groups = [
                    group._replace(rank=rank) for rank, found in enumerate(by_rank) for group in found or ()
                ]
                found = LayerGroups(tuple(groups), drafter_layers)
                if not drafter_layers or found.can_hold_drafter:
                    candidates.add(found)
    if not candidates and ranks[0][0] == drafter_layers:
        raise ValueError(
            "a drafter needs layers that hold all tokens, and visual tokens leave at layer 0: let the first "
            "stage begin at a deeper layer, or remove --speculative-config"
        )
    if not candidates:
        raise ValueError(
            f"the {drafter_layers} layers of a drafter do not fit into the KV-cache group of the first "
            f"layers, of {sum(ranks[0])} in all: withdraw at a deeper layer, or remove --speculative-config"
        )

    def ratio(groups: LayerGroups, keeps: Sequence[float], lost: float) -> float:
        """The memory of a request beside what its tokens need, if groups lose so many tokens by rounding."""
        held = [TYPICAL_TEXT + keep * TYPICAL_VISUAL for keep in keeps]
        needed = sum(size * tokens for sizes in ranks for size, tokens in zip(sizes, held, strict=True))
        taken = groups.layer_tokens(held) + len(ranks) * groups.most_groups * groups.width * lost
        return taken / (needed + groups.num_layers * lost)

    def cost(groups: LayerGroups) -> tuple[float, float, float]:
        of_text = groups.layer_tokens([1] * len(text)) / (len(ranks) * widest)
        unrounded = max(ratio(groups, keeps, 0) for keeps in cases)
        # On average, half a block of each group is lost.
        worst = max(ratio(groups, keeps, TYPICAL_BLOCK / 2) for keeps in cases)
        limits = max(MAX_SHARE, of_text), max(MAX_SHARE, unrounded)
        return *limits, worst + GROUP_SHARE * groups.most_groups

    return min(candidates, key=cost)


@lru_cache(CACHED_POLICIES)
def _groups_of_rank(
    sizes: tuple[int, ...], keeps: tuple[float, ...], width: int
) -> tuple[LayerGroup, ...] | None:
    """The groups of one pipeline rank of which a request takes the fewest blocks.

    Args:
        sizes: The number of the rank's layers in each stage.
        keeps: The fraction of visual tokens that each stage holds.
        width: The largest number of layers that a block may have memory for.

    Returns:
        The groups. None if there would be too many.
    """
    most = max_groups(sum(size > 0 for size in sizes))
    # By the number of groups used so far: the cost and the groups of the stages so far.
    least: dict[int, tuple[float, tuple[tuple[int, ...], ...]]] = {0: (0.0, ())}
    for size, keep in zip(sizes, keeps, strict=True):
        extended: dict[int, tuple[float, tuple[tuple[int, ...], ...]]] = {}
        for used, (cost, chosen) in least.items():
            for more in range(size > 0, most - used + 1 if size else 1):
                pages = pages_of_groups(size, width, more)
                if pages is None or len(pages) < more:
                    continue
                held = TYPICAL_TEXT + keep * TYPICAL_VISUAL
                total = cost + blocks_per_page(pages) * held + more * TYPICAL_BLOCK / 2
                if total < extended.get(used + more, (float("inf"),))[0]:
                    extended[used + more] = total, (*chosen, pages)
        least = extended
    if least:
        _, by_stage = min(least.values())
        groups = tuple(
            LayerGroup(stage, *group)
            for stage, (size, pages) in enumerate(zip(sizes, by_stage, strict=True))
            for group in _fill(size, pages, width)
        )
        if max(group.layers for group in groups) == width:
            return groups
    return _groups_of_rank(sizes, keeps, width - 1) if width > 1 else None


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
        exit_stage: Under a policy with exits, the first stage without the visual tokens. None if they stay,
            under any policy.

    Returns:
        One number for each stage, starting with stage 0.
    """
    everything = images * tokens_per_image
    if exit_stage is None:
        return [everything] * (len(policy.stages) + 1)
    if policy.ranking in BY_IMAGE:
        return [everything, *(images * stage.kept(tokens_per_image) for stage in policy.stages)]
    if policy.ranking is not None:
        return [everything, *(stage.kept(everything) for stage in policy.stages)]
    left = images * (tokens_per_image - withdrawn_per_image(tokens_per_image, align_to))
    return [everything if stage < exit_stage else left for stage in range(len(policy.stages) + 1)]


def withdrawn_per_image(tokens: int, align_to: int) -> int:
    """The smallest number of visual tokens that are withdrawn of an image, at whatever position it begins.

    There has to be text before and after the image. The blocks at its ends may contain text, and then stay:
    with `align_to=16`, at least 560 of an image's 576 tokens are withdrawn.

    Args:
        tokens: The number of visual tokens of the image.
        align_to: 1 to withdraw every visual token, the KV block size to withdraw whole blocks.
    """
    return max(0, (tokens - align_to + 1) // align_to) * align_to
