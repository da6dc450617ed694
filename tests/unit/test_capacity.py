# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Groups of layers and what requests take of them."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.strategies import Prompt
from vllm_vtw.capacity import (
    MAX_GROUPS_PER_STAGE,
    LayerGroup,
    LayerGroups,
    best_partition,
    blocks_per_page,
    pages_of_groups,
    visual_tokens_held,
    withdrawn_per_image,
)
from vllm_vtw.policy import Gate, Policy, Stage

DECODERS = (24, 28, 32, 36, 40, 64)
"""Numbers of layers of real models."""
VISUAL, TEXT = 576, 96
"""The request that memory is measured with."""
MOST = 1.05 + 1e-9
"""The most memory that a request may take, as a share of what its tokens need."""
KEEPS = (0.0, 0.05, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9)


def ranked(layers: list[int], keeps: list[float]) -> Policy:
    return Policy(tuple(map(Stage, sorted(layers), sorted(keeps, reverse=True))))


def gated(*layers: int) -> Policy:
    gate = Gate("gates.safetensors", "0" * 64, (0.0,) * len(layers))
    return Policy(tuple(Stage(layer, 0.0) for layer in layers), gate)


@st.composite
def policies(draw: st.DrawFn, decoders: st.SearchStrategy[int], fewest: int = 0) -> tuple[Policy, int]:
    """Policies of up to 4 withdrawals, with gates or without, and a decoder's number of layers."""
    num_layers = draw(decoders)
    at = st.integers(1, max(1, num_layers - 1))
    layers = draw(st.lists(at, min_size=fewest, max_size=min(4, num_layers - 1), unique=True))
    has_gates = draw(st.booleans())
    if layers and has_gates:
        return gated(*sorted(layers)), num_layers
    of_each = st.lists(st.sampled_from(KEEPS), min_size=len(layers), max_size=len(layers))
    return ranked(layers, draw(of_each)), num_layers


def all_held(policy: Policy) -> Iterator[list[float]]:
    """The tokens that each stage holds of the request, for each stage that gates may let it leave before."""
    stages = range(len(policy.keeps))
    if policy.gate is None:
        yield [TEXT + keep * VISUAL for keep in policy.keeps]
        return
    # It leaves before one of the stages past the first, or never.
    for exit_stage in range(1, len(stages) + 1):
        yield [TEXT + VISUAL * (stage < exit_stage) for stage in stages]


def assert_little_is_wasted(policy: Policy, num_layers: int) -> None:
    groups = LayerGroups.of(policy, num_layers)
    sizes = [len(segment) for segment in policy.segments(num_layers)]
    for held in all_held(policy):
        needed = sum(size * tokens for size, tokens in zip(sizes, held, strict=True))
        assert needed <= groups.layer_tokens(held) + 1e-6
        assert groups.layer_tokens(held) <= MOST * needed, (held, groups)
    assert groups.layer_tokens([TEXT] * len(sizes)) <= MOST * num_layers * TEXT, groups


@pytest.mark.parametrize("num_layers", DECODERS)
def test_a_request_takes_what_its_tokens_need_wherever_they_leave(num_layers: int):
    for layer in range(1, num_layers + 1):
        policy = Policy.withdraw_at(layer, num_layers)
        assert_little_is_wasted(policy, num_layers)
        held = [VISUAL + TEXT, TEXT][: len(policy.keeps)]
        taken = LayerGroups.of(policy, num_layers).layer_tokens(held)
        assert taken <= MOST * (layer * (VISUAL + TEXT) + (num_layers - layer) * TEXT)


@given(policies(st.sampled_from(DECODERS), fewest=2))
@example((gated(1, 16), 32))
@example((gated(4, 15, 18), 32))
@example((gated(3, 26, 33), 40))
@example((gated(1, 9, 17, 23), 64))
def test_a_request_takes_what_its_tokens_need_in_several_stages(given_policy: tuple[Policy, int]):
    assert_little_is_wasted(*given_policy)


@given(policies(st.integers(1, 40)))
def test_every_layer_is_in_one_group_of_its_stage(given_policy: tuple[Policy, int]):
    policy, num_layers = given_policy
    groups = LayerGroups.of(policy, num_layers)
    segments = policy.segments(num_layers)
    stages = [stage for stage, segment in enumerate(segments) for _ in segment]
    assert [group.stage for group in groups.by_layer()] == stages
    assert len(groups.groups) <= MAX_GROUPS_PER_STAGE * max(2, len(segments))
    assert all(group.layers * group.pages <= groups.width for group in groups.groups)
    assert groups.width in {group.layers for group in groups.groups if group.pages == 1}


@given(policies(st.integers(1, 40)))
def test_vllm_makes_these_groups(given_policy: tuple[Policy, int]):
    """It is told how many layers a block has memory for. Each of n groups gets every n-th of the layers."""
    groups = LayerGroups.of(*given_policy)
    for kind in {(group.stage, group.pages) for group in groups.groups}:
        sizes = [group.layers for group in groups.groups if (group.stage, group.pages) == kind]
        count = -(-sum(sizes) // (groups.width // kind[1]))
        assert sizes == [len(range(index, sum(sizes), count)) for index in range(count)]


@pytest.mark.parametrize("drafter_layers", [1, 2, 5])
@pytest.mark.parametrize("num_layers", DECODERS)
def test_a_drafter_is_in_a_group_as_in_stock_vllm(num_layers: int, drafter_layers: int):
    for layer in range(num_layers // 4, num_layers + 1):
        policy = Policy.withdraw_at(layer, num_layers)
        groups = LayerGroups.of(policy, num_layers, drafter_layers=drafter_layers)
        as_in_stock = [group for group in groups.groups if group.stage == 0 and group.pages == 1]
        # It is the group of layer 0, too, and has place for the drafter and one more layer.
        assert as_in_stock == [groups.by_layer()[0]]
        assert as_in_stock[0].layers > drafter_layers
        assert groups.num_layers == num_layers + drafter_layers
        assert len(groups.by_layer()) == num_layers
        held = [VISUAL + TEXT, TEXT][: len(policy.keeps)]
        needed = layer * held[0] + (num_layers - layer) * held[-1] + drafter_layers * held[0]
        assert needed - 1e-6 <= groups.layer_tokens(held) <= 1.12 * needed, (layer, groups)


def sums(total: int, largest: int, most: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of at most `most` numbers, descending."""
    if total == 0:
        yield ()
    elif most:
        for number in range(1, min(total, largest) + 1):
            yield from ((number, *rest) for rest in sums(total - number, number, most - 1))


def test_no_other_groups_of_a_stage_take_less():
    for layers, width, most in product(range(1, 11), range(1, 13), range(1, 6)):
        costs = [
            (sum(Fraction(1, width // size) for size in sizes), len(sizes))
            for sizes in sums(layers, width, most)
        ]
        pages = pages_of_groups(layers, width, most)
        if pages is None:
            assert not costs
            continue
        assert (sum(Fraction(1, number) for number in pages), len(pages)) == min(costs)
        assert blocks_per_page(pages) == pytest.approx(float(min(costs)[0]))
        assert list(pages) == sorted(pages)
        assert sum(width // number for number in pages) >= layers


def split(layer: int, num_layers: int = 32) -> list[tuple[int, int, int]]:
    """The stage, the layers and the pages of each group."""
    groups = LayerGroups.of(Policy.withdraw_at(layer, num_layers), num_layers).groups
    return [(group.stage, group.layers, group.pages) for group in groups]


def test_known_splits():
    assert split(16) == [(0, 16, 1), (1, 16, 1)]
    assert split(24) == [(0, 24, 1), (1, 8, 3)]
    assert split(28) == [(0, 28, 1), (1, 4, 7)]
    assert split(20) == [(0, 20, 1), (1, 10, 2), (1, 2, 10)]
    assert split(4) == [(0, 4, 7), (1, 28, 1)]
    assert split(2) == [(0, 2, 5), (1, 10, 1), (1, 10, 1), (1, 10, 1)]
    assert split(17) == [(0, 15, 1), (0, 2, 7), (1, 15, 1)]
    assert split(32) == [(0, 32, 1)]


@given(st.integers(1, 100), st.sampled_from([1, 2, 8, 16]), st.integers(0, 40))
def test_an_image_withdraws_at_least_what_is_said(tokens: int, align_to: int, start: int):
    retention = Prompt(start + tokens + 1, ((start, start + tokens),)).retention(align_to)
    said = withdrawn_per_image(tokens, align_to)
    assert said <= retention.num_withdrawn < said + 2 * align_to


@pytest.mark.parametrize("num_layers", DECODERS)
def test_withdrawal_saves_more_than_groups_waste(num_layers: int):
    policies = [Policy.withdraw_at(layer, num_layers) for layer in range(1, num_layers)]
    assert not any(LayerGroups.of(policy, num_layers).saves_nothing(policy) for policy in policies)


def test_groups_waste_more_than_a_little_withdrawal_saves():
    keeps_most = ranked([25], [0.95])
    assert LayerGroups.of(keeps_most, 32).saves_nothing(keeps_most)
    keeps_less = ranked([25], [0.5])
    assert not LayerGroups.of(keeps_less, 32).saves_nothing(keeps_less)


def test_what_ranked_stages_hold():
    policy = Policy((Stage(8, 0.5), Stage(16, 0.1), Stage(24, 0.0)))
    assert visual_tokens_held(policy, 3, 15, 1) == [45, 23, 5, 0]
    assert visual_tokens_held(Policy.withdraw_at(8, 32), 3, 15, 4) == [45, 9]
    assert [group.layers for group in LayerGroups.of(policy, 32).groups] == [8, 8, 8, 8]


def test_blocks_of_a_request():
    groups = LayerGroups(
        (LayerGroup(0, 10, 1), LayerGroup(0, 10, 1), LayerGroup(1, 10, 1), LayerGroup(1, 2, 5))
    )
    assert groups.blocks([100, 80], block_size=16) == 2 * 7 + 5 + 1
    assert groups.blocks([100, 81], block_size=16) == 2 * 7 + 6 + 2
    assert groups.blocks([0, 0], block_size=16) == 0


def test_memory_of_a_request():
    groups = LayerGroups.of(Policy.withdraw_at(20, 32), 32)
    assert groups.layer_tokens([100, 10]) == 20 * 100 + 12 * 10
    assert groups.padding_fraction == pytest.approx(0)
    # 11 layers of stage 0, then 11 and 10 layers. A block has memory for 11.
    groups = LayerGroups.of(Policy.withdraw_at(11, 32), 32)
    assert groups.layer_tokens([100, 10]) == 11 * 100 + 22 * 10
    assert groups.padding_fraction == pytest.approx(1 / 33)


@given(st.integers(2, 4), st.integers(8, 40), st.data())
def test_pipeline_ranks_have_groups_of_their_own(num_ranks: int, num_layers: int, data: st.DataObject):
    layer = data.draw(st.integers(1, num_layers - 1))
    policy = Policy.withdraw_at(layer, num_layers)
    borders = sorted(data.draw(st.sets(st.integers(1, num_layers - 1), min_size=1, max_size=num_ranks - 1)))
    ranks = [range(*ends) for ends in pairwise([0, *borders, num_layers])]
    groups = LayerGroups.of(policy, num_layers, ranks)
    for rank, layers in enumerate(ranks):
        of_rank = [group for group in groups.groups if group.rank == rank]
        assert sum(group.layers for group in of_rank) == len(layers)
        assert all(group.layers * group.pages <= groups.width_of(rank) for group in of_rank)
        assert [group.stage for group in groups.by_layer()[layers.start : layers.stop]] == [
            int(index >= layer) for index in layers
        ]
    # In stock vLLM, the rank with the most layers has the fewest blocks.
    in_stock = len(ranks) * max(map(len, ranks))
    assert groups.layer_tokens([1, 1]) <= 1.05 * in_stock + 1e-9


def test_the_best_split_over_ranks():
    """Two ranks of 16 layers save nothing at K = 16: the first one holds all tokens in all of its layers."""
    policy = Policy.withdraw_at(16, 32)
    even = LayerGroups.of(policy, 32, [range(16), range(16, 32)])
    assert even.saves_nothing(policy)
    assert even.layer_tokens([1, 1]) == 32
    best = best_partition(policy, 32, 2, [672, 96])
    taken = LayerGroups.of(policy, 32, best).layer_tokens([672, 96])
    assert taken < 0.8 * even.layer_tokens([672, 96])
    others = [LayerGroups.of(policy, 32, [range(cut), range(cut, 32)]) for cut in range(1, 32)]
    assert taken == min(other.layer_tokens([672, 96]) for other in others)
