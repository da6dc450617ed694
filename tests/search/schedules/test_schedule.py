# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stages merged from a schedule, against trying all there are."""

from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import Price, RequestTokens
from vllm_vtw.search.schedules.schedule import keeps_by_layer, merge_stages, policy_at_borders


@st.composite
def schedules(draw: st.DrawFn) -> list[float]:
    keeps = draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), max_size=8))
    return [1.0, *sorted(keeps, reverse=True)]


# Half of the tokens visual, as `capacity` counts.
REQUEST = RequestTokens(100, 80, 20)


def price(num_layers: int) -> Price:
    return Price(num_layers, 12 * 64 * 64, 64, REQUEST)


@given(schedules(), st.integers(1, 5))
@example(keeps=[1.0, *[0.3] * 7, 0.1], max_stages=3)  # The best of width 1 need too many groups.
def test_no_other_stages_cost_less(keeps: list[float], max_stages: int):
    policy = merge_stages(keeps, max_stages, price(len(keeps)))
    assert len(policy.stages) < max_stages
    given_by_layer = keeps_by_layer(policy, len(keeps))
    assert all(given >= needed for given, needed in zip(given_by_layer, keeps, strict=True))
    others = [
        policy_at_borders(keeps, borders)
        for count in range(max_stages)
        for borders in combinations(range(1, len(keeps)), count)
    ]
    cost = price(len(keeps)).cost
    assert cost(policy) == pytest.approx(min(map(cost, others)))


def test_stages_of_their_own_for_a_layer_or_two_are_not_worth_their_padding():
    keeps = [1.0] * 5 + [0.95] * 5 + [0.6, 0.0]
    policy = merge_stages(keeps, 4, price(12))
    assert len(policy.stages) < 3
    assert price(12).kv_share(policy) < 1 < price(12).kv_share(policy_at_borders(keeps, range(12)))


def test_a_schedule_of_few_steps_stays_as_it_is():
    keeps = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1]
    policy = merge_stages(keeps, 4, price(9))
    assert policy == Policy((Stage(3, 0.5), Stage(6, 0.1)))
    assert keeps_by_layer(policy, 9) == keeps
    assert merge_stages(keeps, 1, price(9)) == Policy(())
