# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The notes of the report of `vtw calibrate`."""

from collections.abc import Collection
from typing import Any

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.vtw.criteria import FIRST_LAYER_TRIED

WITHOUT_TASK = "samples without a task"
"""What reports call the task whose name is empty."""


def notes(result: dict[str, Any], tasks_without_sample: Collection[str]) -> list[str]:
    """Returns what a reader has to know in addition to the numbers.

    Args:
        result: The content of `result.json`.
        tasks_without_sample: The tasks of which no good sample was drawn.
    """
    of_layers = _of_tasks if "per_task" in result else _of_one_layer
    said = of_layers(result, result["criterion"])
    said += data_notes(result, result["budget"]["max_token_change"], tasks_without_sample)
    published = [layer for layer in result["layers"] if layer >= FIRST_LAYER_TRIED]
    if not published or published != list(range(FIRST_LAYER_TRIED, published[-1] + 1)):
        considered = ", ".join(map(str, published)) or "none"
        said.append(
            f"As published, the first-token criterion considers every K from {FIRST_LAYER_TRIED} on; "
            f"here it considered {considered}."
        )
    return said


def _of_one_layer(result: dict[str, Any], criterion: str) -> list[str]:
    """What to know about one K for all tasks."""
    layers, layer = result["layers"], result["layer"][criterion]
    if layer is None:
        return [
            f"No K that was measured satisfies the {criterion} criterion, so there is no policy file: "
            f"{_measure_larger(result)}{_raise_budget(criterion)}, or serve without withdrawal.",
            _at_the_deepest(result, criterion),
        ]
    if result["kv_share"][layers.index(layer)] >= 1:
        return [f"At K = {layer} {_wasted(criterion)}"]
    return []


def _of_tasks(result: dict[str, Any], criterion: str) -> list[str]:
    """What to know about a K for each task."""
    per_task, num_layers = result["per_task"], result["model"]["num_hidden_layers"]
    tasks = {name or WITHOUT_TASK: task for name, task in per_task["tasks"].items()}
    without = [name for name, task in tasks.items() if task["own"] is None]
    unused = [name for name, task in tasks.items() if task["own"] is not None and task["layer"] == num_layers]
    if len(without) == len(tasks):
        return [
            f"No K that was measured satisfies the {criterion} criterion on any task, so there is no policy "
            f"file: {_measure_larger(result)}{_raise_budget(criterion)}, or serve without withdrawal.",
            _at_the_deepest(result, criterion),
        ]
    said = []
    if without:
        said.append(
            f"No K that was measured satisfies the {criterion} criterion on these tasks, so nothing is "
            f"withdrawn from their requests: {', '.join(without)}. To withdraw something, "
            f"{_measure_larger(result)}{_raise_budget(criterion)}."
        )
    if len(without) + len(unused) == len(tasks):
        said.append(
            "Nothing is withdrawn from any task, so there is no policy file: what KV-cache groups waste "
            f"costs more than withdrawal saves. {_raise_budget(criterion).capitalize()} to allow a smaller "
            "K, or serve without withdrawal."
        )
    elif unused:
        said.append(
            "Requests of these tasks keep their visual tokens, because a layer for them would cost more than "
            f"it saves, or need a larger --max-stages: {', '.join(unused)}."
        )
    if per_task["all"]["kv_share"] > 1:
        said.append(f"With these layers {_wasted(criterion)}")
    return said


def _wasted(criterion: str) -> str:
    return (
        "KV-cache groups waste at least as much memory as withdrawal saves: "
        f"{_raise_budget(criterion)} to allow a smaller K, or serve without withdrawal."
    )


def _raise_budget(criterion: str) -> str:
    """What to raise so that the criterion allows more."""
    return "raise --eta" if criterion == "first-token" else "raise --max-answer-kl or --max-token-change"


def _measure_larger(result: dict[str, Any]) -> str:
    if result["before_decoder"]:
        return "raise --keep, "
    measured_all = result["layers"][-1] == result["model"]["num_hidden_layers"] - 1
    return "" if measured_all else "measure larger values with --layers, "


def _at_the_deepest(result: dict[str, Any], criterion: str) -> str:
    """By how much answers differ at the largest K that was measured."""
    if criterion == "first-token":
        deepest = [
            f"mean KL {result['first_token_kl'][-1]:.2g} nats for the first token (--eta allows "
            f"{result['budget']['eta']:g})"
        ]
    else:
        deepest = [
            f"{task}: {curve['token_change'][-1]:.2%} of tokens changed, "
            f"mean KL {curve['mean_kl'][-1]:.2g} nats"
            for task, curve in result["curves"].items()
        ]
    return f"The difference at K = {result['layers'][-1]}, the largest measured: {'; '.join(deepest)}."
