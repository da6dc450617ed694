# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Merges the layers that tasks need into a policy of few stages, from which each task gets one layer."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import STOCK, Price

NO_TASK = ""
"""The name that stands for the requests that name no task. They get the policy's default layer."""


@dataclass(frozen=True)
class TaskTraffic:
    """The requests of a task, and the layers at which their visual tokens may leave.

    Attributes:
        requests: The number of requests, relative to other tasks.
        price: Computes what policies cost for a request of the task.
        layers: The values of K that are within the task's budgets, ascending. It may always get the number
            of layers in addition, with which nothing is withdrawn.
    """

    requests: float
    price: Price
    layers: Sequence[int]


class Shares(NamedTuple):
    """What requests cost, as shares of stock vLLM's.

    Attributes:
        work: The decoder's work on prompts, in floating-point operations.
        memory: The KV memory. What KV-cache groups waste is included, the rounding up to blocks is not.
    """

    work: float
    memory: float


def served_layers(
    tasks: Mapping[str, TaskTraffic], stages: Collection[int], num_layers: int
) -> dict[str, int]:
    """The layer that each task gets from a policy: the first stage that is within its budgets.

    Requests without a task get the first one that is also at least as deep as the layer of any task.

    Args:
        tasks: The tasks by their names, one of which may be `NO_TASK`.
        stages: The first layers of the policy's stages, without stage 0.
        num_layers: The number of decoder layers, which tasks get if no stage is within their budgets.

    Returns:
        The layers by the names of the tasks, in alphabetical order. `NO_TASK` is the last one.
    """

    def first(task: str, least: int) -> int:
        within = tasks[task].layers
        return next((layer for layer in sorted(stages) if layer >= least and layer in within), num_layers)

    served = {task: first(task, 0) for task in sorted(tasks) if task != NO_TASK}
    if NO_TASK in tasks:
        served[NO_TASK] = first(NO_TASK, max(served.values(), default=0))
    return served


def task_policy(served: Mapping[str, int], num_layers: int) -> Policy:
    """The policy that gives tasks these layers. Its default is the deepest of them.

    Args:
        served: The layer of each task. The one of `NO_TASK`, if any, is among the deepest.
        num_layers: The number of decoder layers, with which nothing is withdrawn from a task.
    """
    stages = tuple(Stage(layer, 0.0) for layer in sorted({*served.values()} - {num_layers}))
    if not stages:
        return STOCK
    named = {task: layer for task, layer in served.items() if task != NO_TASK}
    return Policy(stages, layer=max(served.values()), tasks=named)


def task_shares(price: Price, policy: Policy, layer: int) -> Shares:
    """What a request costs whose visual tokens leave at one of the layers that a policy offers.

    Args:
        price: The `Price` for the request.
        policy: The policy, all of whose stages keep no visual tokens.
        layer: The layer, or the number of layers if the visual tokens stay.
    """
    withdrawn = Policy.withdraw_at(layer, price.num_layers)
    memory = price.kv_share_at_exit(policy, policy.exit_stage(layer))
    return Shares(price.flops_share(withdrawn), memory)


def traffic_shares(tasks: Mapping[str, TaskTraffic], policy: Policy, served: Mapping[str, int]) -> Shares:
    """What the requests of all tasks together cost.

    Long requests count for more than short ones, as they do in stock vLLM. If one of two requests takes 900
    tokens of KV memory in stock vLLM and 300 under the policy, and the other one takes 100 in both, the share
    is 0.4.

    Args:
        tasks: The tasks by their names.
        policy: The policy, all of whose stages keep no visual tokens.
        served: The layer that the policy gives each task.
    """
    work = memory = stock_work = stock_memory = 0.0
    for name, task in tasks.items():
        shares = task_shares(task.price, policy, served[name])
        of_work = task.requests * task.price.prefill_flops(STOCK)
        of_memory = task.requests * task.price.layer_held(1)
        work, memory = work + of_work * shares.work, memory + of_memory * shares.memory
        stock_work, stock_memory = stock_work + of_work, stock_memory + of_memory
    return Shares(work / stock_work, memory / stock_memory)


def merge_layers(tasks: Mapping[str, TaskTraffic], max_stages: int, num_layers: int) -> dict[str, int]:
    """Returns for each task the layer that it gets from the cheapest policy of few stages.

    The cost is the sum of the shares of work and KV memory of all requests. No task gets a layer that is not
    within its budgets, so none gets a shallower one than its first. Of policies that cost the same, the one
    with the fewest stages is taken.

    The search begins without stages, with one at each single layer, and with one for each task's first layer.
    From each of these, it adds, removes or moves one stage at a time, each time that with which the policy
    gets the cheapest, as long as it gets cheaper. It may still miss the cheapest policy there is.

    Args:
        tasks: The tasks by their names, one of which may be `NO_TASK`.
        max_stages: The largest number of stages, without stage 0.
        num_layers: The number of decoder layers, with which nothing is withdrawn from a task.
    """

    @cache
    def rank(stages: frozenset[int]) -> tuple[float, ...]:
        served = served_layers(tasks, stages, num_layers)
        cost = sum(traffic_shares(tasks, task_policy(served, num_layers), served))
        # Rounded, so that a difference by rounding is none.
        return max(0, len(stages) - max_stages), round(cost, 9), len(stages), *sorted(stages)

    candidates = frozenset(layer for task in tasks.values() for layer in task.layers)

    def search(stages: frozenset[int]) -> frozenset[int]:
        best = min(_neighbours(stages, candidates, max_stages), key=rank, default=stages)
        return search(best) if rank(best) < rank(stages) else stages

    firsts = frozenset(task.layers[0] for task in tasks.values() if task.layers)
    starts = [frozenset[int](), firsts, *(frozenset({layer}) for layer in candidates)]
    found = min(map(search, starts), key=rank)
    return served_layers(tasks, found, num_layers)


def _neighbours(
    stages: frozenset[int], candidates: frozenset[int], max_stages: int
) -> Iterator[frozenset[int]]:
    """The stages after one of them was removed or moved, or one was added."""
    for removed in stages:
        yield stages - {removed}
        for layer in candidates - stages:
            yield stages - {removed} | {layer}
    if len(stages) < max_stages:
        for layer in candidates - stages:
            yield stages | {layer}
