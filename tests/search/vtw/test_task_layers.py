# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Layers of tasks merged into few stages, against trying all there are."""

from collections.abc import Collection, Mapping
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import Price, RequestTokens
from vllm_vtw.search.vtw.task_layers import (
    NO_TASK,
    Shares,
    TaskTraffic,
    merge_layers,
    served_layers,
    task_policy,
    traffic_shares,
)

Tasks = dict[str, TaskTraffic]
LAYERS = 10


def price(visual: int = 100, text: int = 80, output: int = 20, num_layers: int = LAYERS) -> Price:
    return Price(num_layers, 12 * 64 * 64, 64, RequestTokens(visual, text, output))


def traffic(*layers: int, requests: int = 1, of: Price | None = None) -> TaskTraffic:
    return TaskTraffic(requests, of or price(), layers)


@st.composite
def tasks_of(draw: st.DrawFn, num_layers: int, monotone: bool) -> Tasks:
    def task() -> TaskTraffic:
        first = draw(st.integers(2, num_layers))
        rest = range(first + 1, num_layers)
        layers = set(rest) if monotone else draw(st.sets(st.sampled_from(rest))) if rest else set()
        of = price(draw(st.sampled_from([60, 576, 2000])), draw(st.sampled_from([40, 200])), 50, num_layers)
        own = [first] if first < num_layers else []
        return traffic(*own, *sorted(layers), requests=draw(st.integers(1, 20)), of=of)

    names = draw(st.sets(st.sampled_from("abcdef"), min_size=1))
    return {name: task() for name in sorted(names)} | ({NO_TASK: task()} if draw(st.booleans()) else {})


def cost(tasks: Tasks, served: Mapping[str, int], num_layers: int) -> float:
    """The shares of work and KV memory of all requests, written out."""
    stages = sorted({*served.values()} - {num_layers})
    borders = [0, *stages, num_layers]
    groups = LayerGroups.of(Policy(tuple(Stage(layer, 0.0) for layer in stages)), num_layers)
    work = memory = stock_work = stock_memory = 0.0
    for name, task in tasks.items():
        layer, tokens = served[name], task.price.request
        full = task.price.layer_flops(1)
        work += task.requests * (layer * full + (num_layers - layer) * task.price.layer_flops(0))
        stock_work += task.requests * num_layers * full
        rest = tokens.text + tokens.output
        held = [rest + tokens.visual * (border < layer) for border in borders[:-1]]
        memory += task.requests * groups.layer_tokens(held)
        stock_memory += task.requests * num_layers * (rest + tokens.visual)
    return work / stock_work + memory / stock_memory


def every_choice(tasks: Tasks, max_stages: int, num_layers: int) -> list[dict[str, int]]:
    candidates = sorted({layer for task in tasks.values() for layer in task.layers})
    return [
        served_layers(tasks, stages, num_layers)
        for count in range(max_stages + 1)
        for stages in combinations(candidates, count)
    ]


def check_budgets(tasks: Tasks, served: Mapping[str, int], max_stages: int, num_layers: int) -> None:
    assert served.keys() == tasks.keys()
    assert len({*served.values()} - {num_layers}) <= max_stages
    for name, layer in served.items():
        assert layer == num_layers or layer in tasks[name].layers
    assert NO_TASK not in tasks or served[NO_TASK] == max(served.values())


# With curves that are not monotone, the search may miss the cheapest policy by a little.
@given(tasks_of(LAYERS, monotone=True), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_other_stages_cost_less(tasks: Tasks, max_stages: int):
    served = merge_layers(tasks, max_stages, LAYERS)
    check_budgets(tasks, served, max_stages, LAYERS)
    costs = [cost(tasks, choice, LAYERS) for choice in every_choice(tasks, max_stages, LAYERS)]
    assert cost(tasks, served, LAYERS) == pytest.approx(min(costs), rel=2e-3)


@given(tasks_of(LAYERS, monotone=False), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_other_stages_cost_much_less_if_deeper_may_be_worse(tasks: Tasks, max_stages: int):
    served = merge_layers(tasks, max_stages, LAYERS)
    check_budgets(tasks, served, max_stages, LAYERS)
    costs = [cost(tasks, choice, LAYERS) for choice in every_choice(tasks, max_stages, LAYERS)]
    assert min(costs) <= cost(tasks, served, LAYERS) * (1 + 1e-9)
    assert cost(tasks, served, LAYERS) < 1.05 * min(costs)


@given(tasks_of(32, monotone=False), st.integers(1, 2))
@settings(max_examples=5, deadline=None)
def test_no_other_stages_of_many_layers_cost_much_less(tasks: Tasks, max_stages: int):
    served = merge_layers(tasks, max_stages, 32)
    check_budgets(tasks, served, max_stages, 32)
    least = min(cost(tasks, choice, 32) for choice in every_choice(tasks, max_stages, 32))
    assert cost(tasks, served, 32) < 1.05 * least


@given(tasks_of(LAYERS, monotone=False), st.sets(st.integers(2, LAYERS - 1), max_size=4))
def test_a_task_gets_the_first_stage_within_its_budgets(tasks: Tasks, stages: Collection[int]):
    served = served_layers(tasks, stages, LAYERS)
    named = [name for name in tasks if name != NO_TASK]
    for name in named:
        assert served[name] == min([*({*stages} & {*tasks[name].layers}), LAYERS])
    if NO_TASK in tasks:
        deepest = max(served[name] for name in named)
        within = {layer for layer in {*stages} & {*tasks[NO_TASK].layers} if layer >= deepest}
        assert served[NO_TASK] == min([*within, LAYERS])


@given(tasks_of(LAYERS, monotone=False), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_policy_is_one_that_can_be_read(tasks: Tasks, max_stages: int):
    served = merge_layers(tasks, max_stages, LAYERS)
    policy = task_policy(served, LAYERS)
    model = {"model_type": "llava", "num_hidden_layers": LAYERS, "hidden_size": 64}
    assert Policy.from_json(policy.to_json(model), model) == policy
    assert sum(traffic_shares(tasks, policy, served)) == pytest.approx(cost(tasks, served, LAYERS))
    if policy.stages:
        assert policy.layer == max(served.values())
        assert policy.tasks == {name: layer for name, layer in served.items() if name != NO_TASK}
    else:
        assert {*served.values()} == {LAYERS}


def test_tasks_move_to_a_layer_within_the_budgets_of_both():
    tasks = {"a": traffic(5, 7, 8), "b": traffic(6, 7, 8)}
    assert merge_layers(tasks, 2, LAYERS) == {"a": 5, "b": 6}
    assert merge_layers(tasks, 1, LAYERS) == {"a": 7, "b": 7}


def test_a_policy_that_no_single_change_leads_to():
    """From {5, 7}, which a search without stages ends at, both stages have to move."""
    long, short = price(2000, 40, 50), price(60, 40, 50)
    tasks = {
        "a": traffic(5, 6, 7, 8, 9, requests=11, of=long),
        "b": traffic(6, 7, 8, 9, requests=5, of=long),
        "c": traffic(*range(3, 10), requests=9, of=long),
        "d": traffic(*range(2, 10), of=short),
        "e": traffic(7, 8, 9, requests=9, of=price(576, 40, 50)),
    }
    assert merge_layers(tasks, 2, LAYERS) == {"a": 6, "b": 6, "c": 3, "d": 3, "e": LAYERS}


def test_the_more_frequent_task_decides():
    rare, often = traffic(3), traffic(6, 7, 8, 9, requests=9)
    assert merge_layers({"a": rare, "b": often}, 1, LAYERS) == {"a": LAYERS, "b": 6}
    often = traffic(3, requests=9)
    assert merge_layers({"a": often, "b": traffic(6, 7, 8, 9)}, 1, LAYERS) == {"a": 3, "b": LAYERS}


def test_the_longer_requests_count_for_more():
    long = traffic(3, of=price(visual=2000))
    assert merge_layers({"a": long, "b": traffic(6)}, 1, LAYERS) == {"a": 3, "b": LAYERS}
    # One of two requests takes 900 of 1000 tokens in stock vLLM. All but 200 are visual, and leave halfway.
    tasks = {"a": traffic(5, of=price(700, 150, 50)), "b": traffic(of=price(0, 50, 50))}
    served = {"a": 5, "b": LAYERS}
    assert traffic_shares(tasks, task_policy(served, LAYERS), served).memory == pytest.approx(0.65)


def test_requests_without_a_task_get_the_deepest_layer():
    tasks = {"a": traffic(3, 4, 5, 6), "b": traffic(6, 7), NO_TASK: traffic(2, 7, 8)}
    assert served_layers(tasks, {3, 6, 7}, LAYERS) == {"a": 3, "b": 6, NO_TASK: 7}
    assert served_layers(tasks, {2, 3, 6}, LAYERS) == {"a": 3, "b": 6, NO_TASK: LAYERS}
    policy = task_policy({"a": 3, "b": 6, NO_TASK: LAYERS}, LAYERS)
    assert (policy.layer, policy.tasks) == (LAYERS, {"a": 3, "b": 6})


def test_without_a_layer_nothing_is_withdrawn():
    tasks = {"a": traffic(), "b": traffic()}
    served = merge_layers(tasks, 4, LAYERS)
    assert served == {"a": LAYERS, "b": LAYERS}
    policy = task_policy(served, LAYERS)
    assert policy == Policy(())
    assert traffic_shares(tasks, policy, served) == Shares(1, 1)


def test_a_layer_that_saves_less_than_groups_waste_is_not_used():
    of = Price(32, 1, 1, RequestTokens(visual=10, text=800, output=100))
    assert of.cost(Policy.withdraw_at(25, 32)) > 2
    assert merge_layers({"a": traffic(25, of=of)}, 4, 32) == {"a": 32}
    assert merge_layers({"a": traffic(20, 25, of=of)}, 4, 32) == {"a": 20}
