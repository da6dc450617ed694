# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Chooses a layer for each task of a calibration's samples."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_vtw.policy import Policy
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.vtw.calibration import Budget, curve, first_token_kl, mean_price
from vllm_vtw.search.vtw.calibration_journal import MeasuredSample
from vllm_vtw.search.vtw.criteria import answer_layers, first_token_layers
from vllm_vtw.search.vtw.task_layers import (
    NO_TASK,
    Shares,
    TaskTraffic,
    merge_layers,
    task_policy,
    task_shares,
    traffic_shares,
)


def layers_within(
    measured: Sequence[MeasuredSample], layers: Sequence[int], criterion: str, budget: Budget
) -> list[int]:
    """The values of K that satisfy a criterion on samples of one task, ascending.

    Args:
        measured: The samples. There has to be at least one.
        layers: The values of K that were measured, ascending.
        criterion: "answer" or "first-token".
        budget: What the criterion allows.
    """
    if criterion == "first-token":
        return first_token_layers(first_token_kl(measured, layers), budget.eta)
    curves = {"": curve(measured, layers)}
    return answer_layers(curves, budget.max_answer_kl, budget.max_token_change)


def layer_by_task(
    result: Mapping[str, Any],
    model: HFModel,
    measured: Sequence[MeasuredSample],
    unnamed: Collection[str],
    criterion: str,
    budget: Budget,
    max_stages: int,
) -> dict[str, Any]:
    """Returns the layer of each task, and what they cost, as `result.json` holds them under "per_task".

    Args:
        result: The result of the calibration, with one K for all tasks.
        model: The model that was measured.
        measured: The measured samples.
        unnamed: The `MeasuredSample.where` of samples for which the data names no task.
        criterion: The criterion that tasks have to satisfy, "answer" or "first-token".
        budget: What the criterion allows.
        max_stages: The largest number of layers at which visual tokens leave.

    Returns:
        An object for JSON. Samples for which the data names no task have the task `NO_TASK`. "own" is the
        first K within a task's budgets, null if there is none. "layer" is the layer that the policy gives,
        which is the number of layers if nothing is withdrawn.
    """
    layers, num_layers = result["layers"], result["model"]["num_hidden_layers"]
    by_task = defaultdict(list)
    for sample in measured:
        by_task[NO_TASK if sample.where in unnamed else sample.task].append(sample)
    tasks = {
        task: TaskTraffic(
            requests=len(of_task),
            price=mean_price(num_layers, model, of_task),
            layers=layers_within(of_task, layers, criterion, budget),
        )
        for task, of_task in by_task.items()
    }
    served = merge_layers(tasks, max_stages, num_layers)
    policy = task_policy(served, num_layers)
    single = result["layer"][criterion]
    return {
        "max_stages": max_stages,
        "layer": max(served.values()),
        "tasks": {
            name: {
                "samples": len(by_task[name]),
                "own": next(iter(tasks[name].layers), None),
                "layer": layer,
                **_shares(task_shares(tasks[name].price, policy, layer)),
                **_changed(by_task[name], layers, layer),
            }
            for name, layer in served.items()
        },
        "all": _shares(traffic_shares(tasks, policy, served)),
        "single": None
        if single is None
        else {"layer": single}
        | _shares(
            traffic_shares(tasks, Policy.withdraw_at(single, num_layers), dict.fromkeys(tasks, single))
        ),
    }


def _changed(measured: Sequence[MeasuredSample], layers: Sequence[int], layer: int) -> dict[str, float]:
    """The shares of answers' tokens and of answers that change. Nothing does if nothing is withdrawn.

    Args:
        measured: The samples of a task.
        layers: The values of K that were measured.
        layer: Where visual tokens leave, or the number of layers.
    """
    at = curve(measured, layers).get(layer)
    return {name: getattr(at, name) if at else 0.0 for name in ("token_change", "answer_change")}


def _shares(shares: Shares) -> dict[str, float]:
    return {"kv_share": shares.memory, "prefill_flops_share": shares.work}
