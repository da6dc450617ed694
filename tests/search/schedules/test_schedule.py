# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stages merged from a schedule, against trying all there are."""

from itertools import combinations

import pytest
from hypothesis import example, given, settings
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


def price(num_layers: int, work_weight: float = 1.0) -> Price:
    return Price(num_layers, 12 * 64 * 64, 64, REQUEST, work_weight)


def every_policy(keeps: list[float], max_stages: int) -> set[Policy]:
    return {
        policy_at_borders(keeps, borders)
        for count in range(max_stages)
        for borders in combinations(range(1, len(keeps)), count)
    }


@given(schedules(), st.integers(1, 5))
def test_no_other_stages_of_few_layers_cost_less(keeps: list[float], max_stages: int):
    policy = merge_stages(keeps, max_stages, price(len(keeps)))
    assert len(policy.stages) < max_stages
    given_by_layer = keeps_by_layer(policy, len(keeps))
    assert all(given >= needed for given, needed in zip(given_by_layer, keeps, strict=True))
    cost = price(len(keeps)).cost
    assert cost(policy) == pytest.approx(min(map(cost, every_policy(keeps, max_stages))))


# Of 1500 random schedules, the worst was 1.4% off.
@given(st.lists(st.integers(0, 64), min_size=31, max_size=31), st.sampled_from([1e-3, 0.1, 1.0]))
@example(parts=[64] * 21 + [61, 7] + [0] * 8, work_weight=0.1)
@settings(max_examples=5)
def test_no_other_stages_of_many_layers_cost_much_less(parts: list[int], work_weight: float):
    keeps = [1.0, *(part / 64 for part in sorted(parts, reverse=True))]
    cost = price(32, work_weight).cost
    least = min(map(cost, every_policy(keeps, 3)))
    assert least <= cost(merge_stages(keeps, 3, price(32, work_weight))) < 1.02 * least


def test_a_border_moves_to_where_groups_waste_less():
    for_memory = Price(32, 12 * 64 * 64, 64, RequestTokens(100, 800, 100), work_weight=1e-3)
    assert for_memory.kv_share(Policy.withdraw_at(25, 32)) > 1
    policy = merge_stages([1.0] * 25 + [0.0] * 7, 4, for_memory)
    assert policy.stages[0].layer > 25
    assert for_memory.kv_share(policy) < 1


def test_a_schedule_of_few_steps_stays_as_it_is():
    keeps = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1]
    policy = merge_stages(keeps, 4, price(9))
    assert policy == Policy((Stage(3, 0.5), Stage(6, 0.1)))
    assert keeps_by_layer(policy, 9) == keeps
    assert merge_stages(keeps, 1, price(9)) == Policy(())
