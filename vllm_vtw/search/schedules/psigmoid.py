"""P-Sigmoid: the schedule that disturbs answers least, of those that a budget pays for.

A layer gets a fraction of the visual tokens that falls with its depth along a sigmoid. *Ours*: of layer l it
is `r_max / (1 + exp(k (l - m)))`, and 1 at most; steepness k and middle m are searched with Optuna's TPE
sampler, and r_max is as large as the budget allows, for the stages that the schedule is merged into.
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
from vllm_vtw.search.data.draw import SEEDS
from vllm_vtw.search.divergence import Curve
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.schedule import FIRST_LAYER, GRID, at_borders, merged

LEAST = 1e-4
BISECTIONS = 24
STEEPNESS = (0.02, 3.0)


def sigmoid(k: float, m: float, r_max: float, num_layers: int) -> list[float]:
    """The fraction of visual tokens that each layer gets, rounded down to the grid."""
    falling = [min(1.0, r_max / (1 + exp(k * (layer - m)))) for layer in range(num_layers)]
    return [1.0] * FIRST_LAYER + [floor(GRID * keep) / GRID for keep in falling[FIRST_LAYER:]]


@dataclass(frozen=True)
class Afforded:
    """A sigmoid's schedule, and the stages made of it."""

    k: float
    m: float
    r_max: float
    keeps: tuple[float, ...]
    policy: Policy


def affordable(
    k: float, m: float, max_stages: int, price: Price, share: Callable[[Policy], float], budget: float
) -> Afforded:
    """The schedule of a sigmoid that spends a budget, which has to pay for `cheapest`.

    As r_max grows, stages begin elsewhere and their cost jumps. So their borders are those of the largest
    r_max that was found to pay, and r_max then grows as far as it pays with these.

    Args:
        k: Steepness.
        m: Middle, a layer.
        max_stages: As of `merged`.
        price: As of `merged`.
        share: What a policy leaves to be paid.
        budget: The most that `share` may be.
    """

    def keeps(log_r_max: float) -> list[float]:
        return sigmoid(k, m, exp(log_r_max), price.num_layers)

    def highest(low: float, high: float, policy: Callable[[float], Policy]) -> float:
        """The largest r_max that pays, where `low` does."""
        if share(policy(high)) <= budget:
            return high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if share(policy(middle)) <= budget else (low, middle)
        return low

    def best(log_r_max: float) -> Policy:
        return merged(keeps(log_r_max), max_stages, price)

    everything = log(1 + exp(k * (price.num_layers - m)))
    least = highest(log(LEAST), everything, best)
    borders = [stage.layer for stage in best(least).stages]

    def with_these(log_r_max: float) -> Policy:
        return at_borders(keeps(log_r_max), borders)

    most = highest(least, everything, with_these)
    return Afforded(k, m, exp(most), tuple(keeps(most)), with_these(most))


def cheapest(max_stages: int, price: Price) -> Policy:
    """What any sigmoid comes to as r_max falls."""
    return merged([1.0] * FIRST_LAYER + [0.0] * (price.num_layers - FIRST_LAYER), max_stages, price)


def p_sigmoid(
    afford: Callable[[float, float], Afforded],
    effect: Callable[[Policy], dict[str, Curve]],
    num_layers: int,
    trials: int,
    seed: int,
    storage: Path,
    each: Callable[[int], Any],
) -> tuple[Afforded, int]:
    """The schedule with the least mean KL on the worst task, and of how many trials.

    Args:
        afford: The schedule of a steepness and a middle.
        effect: What a policy does to answers, by task.
        num_layers: Of the decoder.
        trials: To have made in the end, with those of `storage`.
        seed: Of the sampler.
        storage: Optuna's journal, which a search that was interrupted goes on from as if it had not been.
        each: Called with the number of trials that were made.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalStorage(JournalFileBackend(str(storage)))
    study = optuna.create_study(study_name="p-sigmoid", storage=backend, load_if_exists=True)
    known: dict[Policy, float] = {}

    def worst(trial: optuna.Trial) -> float:
        k = trial.suggest_float("k", *STEEPNESS, log=True)
        m = trial.suggest_float("m", 0, num_layers)
        policy = afford(k, m).policy
        if policy not in known:
            known[policy] = max(curve.mean_kl for curve in effect(policy).values())
        return known[policy]

    while (count := len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))) < trials:
        each(count)
        # A sampler's stream is not stored. Of its own for each trial, it is the same after an interruption.
        study.sampler = optuna.samplers.TPESampler(seed=(seed + count) % SEEDS)
        study.optimize(worst, n_trials=1)
    each(count)
    return afford(study.best_params["k"], study.best_params["m"]), count
