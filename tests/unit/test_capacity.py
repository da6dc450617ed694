# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Groups of layers and what requests take of them."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import Prompt
from vllm_vtw.capacity import (
    MAX_GROUPS_PER_STAGE,
    LayerGroups,
    layers_per_group,
    visual_tokens_held,
    withdrawn_per_image,
)
from vllm_vtw.policy import Policy, Stage


@st.composite
def policies(draw: st.DrawFn) -> tuple[Policy, int]:
    num_layers = draw(st.integers(1, 40))
    layers = draw(st.sets(st.integers(1, num_layers - 1), max_size=4)) if num_layers > 1 else set()
    keeps = draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9]), min_size=len(layers), max_size=len(layers)))
    stages = zip(sorted(layers), sorted(keeps, reverse=True), strict=True)
    return Policy(tuple(Stage(layer, keep) for layer, keep in stages)), num_layers


@given(policies())
def test_every_layer_is_in_one_group_of_its_stage(given_policy):
    policy, num_layers = given_policy
    groups = LayerGroups.of(policy, num_layers)
    for stage, segment in enumerate(policy.segments(num_layers)):
        sizes = [layers for of, layers in zip(groups.stages, groups.layers, strict=True) if of == stage]
        assert sum(sizes) == len(segment)
        assert max(sizes) - min(sizes) <= 1
    assert len(groups.stages) <= MAX_GROUPS_PER_STAGE * max(2, len(policy.stages) + 1)
    sizes = [len(segment) for segment in policy.segments(num_layers)]
    assert groups.width == layers_per_group(sizes, policy.keeps)


@given(st.integers(2, 40), st.data())
def test_no_other_split_takes_less(num_layers: int, data: st.DataObject):
    """For a request with as many visual as text tokens, no other numbers of groups take less memory."""
    layer = data.draw(st.integers(1, num_layers - 1))
    groups = LayerGroups.of(Policy.withdraw_at(layer, num_layers), num_layers)

    def taken(first: int, second: int) -> int:
        width = max(-(-layer // first), -(-(num_layers - layer) // second))
        return width * (2 * first + second)

    chosen = groups.width * (2 * groups.stages.count(0) + groups.stages.count(1))
    counts = [n for n in product(range(1, 4), repeat=2) if sum(n) <= 4]
    assert chosen == min(taken(*count) for count in counts)


def test_known_splits():
    def split(layer: int, num_layers: int = 32) -> tuple[int, ...]:
        return LayerGroups.of(Policy.withdraw_at(layer, num_layers), num_layers).layers

    assert split(16) == (16, 16)
    assert split(17) == (17, 15)
    assert split(20) == (10, 10, 12)
    assert split(24) == (8, 8, 8, 8)
    assert split(2) == (2, 10, 10, 10)
    assert split(32) == (32,)


@given(st.integers(1, 100), st.sampled_from([1, 2, 8, 16]), st.integers(0, 40))
def test_an_image_withdraws_at_least_what_is_said(tokens: int, align_to: int, start: int):
    retention = Prompt(start + tokens + 1, ((start, start + tokens),)).retention(align_to)
    said = withdrawn_per_image(tokens, align_to)
    assert said <= retention.num_withdrawn < said + 2 * align_to


def test_where_padding_takes_more_than_withdrawal_saves():
    policies = {k: Policy.withdraw_at(k, 32) for k in range(1, 33)}
    worse = [k for k, policy in policies.items() if LayerGroups.of(policy, 32).takes_more_than_stock(policy)]
    assert worse == [28, 29, 30, 31]
    keeps_most = Policy((Stage(8, 0.95), Stage(31, 0.9)))
    assert LayerGroups.of(keeps_most, 32).takes_more_than_stock(keeps_most)


def test_what_ranked_stages_hold():
    ranked = Policy((Stage(8, 0.5), Stage(16, 0.1), Stage(24, 0.0)))
    assert visual_tokens_held(ranked, 3, 15, 1) == [45, 23, 5, 0]
    assert visual_tokens_held(Policy.withdraw_at(8, 32), 3, 15, 4) == [45, 9]
    assert LayerGroups.of(ranked, 32).layers == (8, 8, 8, 8)


def test_blocks_of_a_request():
    groups = LayerGroups.of(Policy.withdraw_at(24, 32), 32)
    assert groups.blocks([100, 30], block_size=16) == 3 * 7 + 2
    assert groups.padding_fraction == 0
