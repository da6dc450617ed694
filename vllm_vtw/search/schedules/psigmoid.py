# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""P-Sigmoid (arXiv 2412.00556): the schedule within a budget that changes answers least.

The fraction of visual tokens that a layer gets falls with the layer's depth along a sigmoid.

The details are this project's own choice, not the paper's. Layer l gets the fraction
`r_max / (1 + exp(k (l - m)))`, at most 1. Steepness k and middle m are searched with Optuna's TPE sampler,
and r_max is as large as the budget allows for the stages that the schedule is merged into.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, floor, log
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from vllm_vtw.policy import Policy
from vllm_vtw.search.data.random_order import SEEDS
from vllm_vtw.search.divergence import TaskDivergence
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.schedule import GRID, merge_stages, policy_at_borders

MIN_R_MAX = 1e-4
"""The smallest r_max. On the grid, all layers that may get fewer visual tokens then get none, but for layer
0, which gets the least fraction above 0."""
BISECTIONS = 24
"""The number of bisection steps in a search for r_max."""
STEEPNESS = (0.02, 3.0)
"""The range in which k is searched."""


def sigmoid(k: float, m: float, r_max: float, layers: range) -> list[float]:
    """The fraction of visual tokens that each layer gets, rounded down to the grid.

    Args:
        k: The steepness of the sigmoid.
        m: The middle of the sigmoid, as a layer.
        r_max: The fraction that the sigmoid starts from, far before layer m. If it is more than 1, more
            layers get all visual tokens.
        layers: The layers that may get fewer visual tokens, up to the last one.
    """
    falling = [min(1.0, r_max / (1 + exp(k * (layer - m)))) for layer in layers]
    keeps = [1.0] * layers.start + [floor(GRID * keep) / GRID for keep in falling]
    # A policy may not withdraw everything before the decoder.
    return [max(keeps[0], 1 / GRID), *keeps[1:]]


@dataclass(frozen=True)
class BudgetedSchedule:
    """A sigmoid's schedule that is within a budget.

    Attributes:
        k: The steepness of the sigmoid.
        m: The middle of the sigmoid, as a layer.
        r_max: The fraction that the sigmoid starts from.
        keeps: The fraction of visual tokens that the sigmoid gives to each layer.
        policy: The stages that the schedule is merged into.
    """

    k: float
    m: float
    r_max: float
    keeps: tuple[float, ...]
    policy: Policy


def affordable(
    k: float,
    m: float,
    first_layer: int,
    max_stages: int,
    price: Price,
    share: Callable[[Policy], float],
    budget: float,
) -> BudgetedSchedule:
    """Returns the schedule of a sigmoid with the largest r_max that is within a budget.

    As r_max grows, `merge_stages` lets stages begin at other layers, and their cost jumps. Therefore r_max is
    searched twice. The first search lets `merge_stages` choose the layers at which stages begin. The second
    one keeps the layers that the first one ended with, and increases r_max as far as the budget allows.

    Args:
        k: The steepness of the sigmoid.
        m: The middle of the sigmoid, as a layer.
        first_layer: The first layer that may get fewer visual tokens.
        max_stages: The largest number of stages, stage 0 included.
        price: Computes the cost of policies.
        share: The cost of a policy that the budget limits, such as `Price.flops_share`.
        budget: The largest `share` that is allowed. It has to be at least that of `cheapest`.
    """

    def keeps(log_r_max: float) -> list[float]:
        return sigmoid(k, m, exp(log_r_max), range(first_layer, price.num_layers))

    def highest(low: float, high: float, policy: Callable[[float], Policy]) -> float:
        """The largest logarithm of r_max from `low` to `high` that is within budget. `low` has to be."""
        if share(policy(high)) <= budget:
            return high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if share(policy(middle)) <= budget else (low, middle)
        return low

    def with_free_borders(log_r_max: float) -> Policy:
        return merge_stages(keeps(log_r_max), max_stages, price)

    # With this r_max, all layers get all visual tokens.
    everything = log(1 + exp(k * (price.num_layers - m)))
    least = highest(log(MIN_R_MAX), everything, with_free_borders)
    borders = [stage.layer for stage in with_free_borders(least).stages]

    def with_these_borders(log_r_max: float) -> Policy:
        return policy_at_borders(keeps(log_r_max), borders)

    most = highest(least, everything, with_these_borders)
    return BudgetedSchedule(k, m, exp(most), tuple(keeps(most)), with_these_borders(most))


def cheapest(first_layer: int, max_stages: int, price: Price) -> Policy:
    """The policy of any sigmoid with the least r_max: layers from `first_layer` on get no visual tokens.

    Layer 0 gets some.
    """
    keeps = sigmoid(1.0, 0.0, MIN_R_MAX, range(first_layer, price.num_layers))
    return merge_stages(keeps, max_stages, price)


def p_sigmoid(
    afford: Callable[[float, float], BudgetedSchedule],
    effect: Callable[[Policy], dict[str, TaskDivergence]],
    num_layers: int,
    trials: int,
    seed: int,
    storage: Path,
    each: Callable[[int], Any],
) -> tuple[BudgetedSchedule, int]:
    """Searches the schedule whose answers have the least mean KL, on the task where it is largest.

    Args:
        afford: Returns the schedule within budget for a steepness k and a middle m.
        effect: Returns how a policy changes answers, by task.
        num_layers: The number of decoder layers.
        trials: The number of schedules to try, those in `storage` included.
        seed: The seed of the sampler.
        storage: The file of Optuna's journal. If it holds the trials of an interrupted search, the search
            goes on from there, and finds what it would have found without the interruption.
        each: Called with the number of trials that are complete, before every trial and at the end.

    Returns:
        The best schedule, and the number of trials that are complete.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalStorage(JournalFileBackend(str(storage)))
    study = optuna.create_study(study_name="p-sigmoid", storage=backend, load_if_exists=True)
    known: dict[Policy, float] = {}  # Different sigmoids can be merged into the same policy.

    def worst_mean_kl(trial: optuna.Trial) -> float:
        k = trial.suggest_float("k", *STEEPNESS, log=True)
        m = trial.suggest_float("m", 0, num_layers)
        policy = afford(k, m).policy
        if policy not in known:
            known[policy] = max(curve.mean_kl for curve in effect(policy).values())
        return known[policy]

    while (count := len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))) < trials:
        each(count)
        # Optuna does not store the state of the sampler's random numbers. With a sampler of its own, seeded
        # by its number, each trial is the same after an interruption.
        study.sampler = optuna.samplers.TPESampler(seed=(seed + count) % SEEDS)
        study.optimize(worst_mean_kl, n_trials=1)
    each(count)
    return afford(study.best_params["k"], study.best_params["m"]), count
