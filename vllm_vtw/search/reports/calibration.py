# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The report of `vtw calibrate`."""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.calibration_notes import WITHOUT_TASK
from vllm_vtw.search.reports.comparison import NO_RESOLUTION, plain_winner, policy_table, stages, worst
from vllm_vtw.search.reports.page import (
    INK,
    MARKERS,
    Draw,
    Price,
    label_layers,
    page,
    price_of,
    scale_by_powers,
    task_label,
)

LEAST_KL = 1e-6
"""Smaller values are drawn at this one, because a logarithmic axis has no 0."""
LINES = {"answer": "-", "first-token": "--"}
"""How the K of each criterion is drawn."""


def html(result: dict[str, Any], command: str | None) -> str:
    """Renders the report of a calibration to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the chosen K. None if there is none.
    """
    given = {"command": command, "without_task": WITHOUT_TASK, "winner": _winner(result)}
    compared = {"shown": {}, "kept": stages, "worst": worst, "no_resolution": NO_RESOLUTION}
    return page(
        "calibration.html", result, _choice(result), _price(result), _plots(result), **given, **compared
    )


def _choice(result: dict[str, Any]) -> str:
    """Where visual tokens leave, in a sentence."""
    num_layers, layer = result["model"]["num_hidden_layers"], result["layer"][result["criterion"]]
    if "per_task" in result:
        served = {task["layer"] for task in result["per_task"]["tasks"].values()} - {num_layers}
        if not served:
            return "Nothing is withdrawn from any task"
        layers = ", ".join(map(str, sorted(served)))
        return f"Visual tokens leave at a layer for each task: K = {layers} of {num_layers} layers"
    if layer is None:
        return f"No K satisfies the {result['criterion']} criterion"
    leave = f"leave at K = {layer} of {num_layers} layers"
    if (before := result["before_decoder"]) is None:
        return f"Visual tokens {leave}"
    kept = f"{100 * before['keep']:g}% of each picture's visual tokens go into the decoder"
    return f"{kept}, and {'stay in all its layers' if layer == num_layers else leave}"


def _price(result: dict[str, Any]) -> Price:
    """What the layers that were chosen cost. Empty if nothing is withdrawn."""
    if "per_task" in result:
        tasks = {name or WITHOUT_TASK: task for name, task in result["per_task"]["tasks"].items()}
        if all(task["layer"] == result["model"]["num_hidden_layers"] for task in tasks.values()):
            return []
        return price_of(result["per_task"]["all"], tasks)
    layer = result["layer"][result["criterion"]]
    if layer is None:
        return []
    at = result["layers"].index(layer)

    def there(by_layer: dict[str, Any], *names: str) -> dict[str, float]:
        return {name: by_layer[name][at] for name in names}

    changes = {
        task: there(curve, "token_change", "answer_change") for task, curve in result["curves"].items()
    }
    return price_of(there(result, "kv_share", "prefill_flops_share"), changes)


def _winner(result: dict[str, Any]) -> str | None:
    """The sentence about a plain baseline that is better than the K that was chosen."""
    policies = result["policies"]
    return plain_winner(result, next(iter(policies)), "work") if policies else None


def _plots(result: dict[str, Any]) -> dict[str, Draw]:
    layers, budget, curves = result["layers"], result["budget"], result["curves"]

    def first_token(axes: Axes) -> None:
        axes.plot(layers, _visible(result["first_token_kl"]), "o-", label="all samples")
        axes.axhline(budget["eta"], color="grey", linestyle=":", label="eta")
        scale_by_powers(axes)
        axes.set_ylabel("KL of the first token (nats)")

    def answer_kl(axes: Axes) -> None:
        for marker, (task, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
            (line,) = axes.plot(layers, _visible(curve["mean_kl"]), f"{marker}-", label=task_label(task))
            axes.plot(layers, _visible(curve["p95_kl"]), "--", color=line.get_color(), alpha=0.4)
        axes.axhline(budget["max_answer_kl"], color="grey", linestyle=":", label="budget")
        scale_by_powers(axes)
        axes.set_ylabel("KL of a token (nats): mean,\nand dashed 95th percentile")

    def token_change(axes: Axes) -> None:
        for marker, (task, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
            axes.plot(
                layers, [100 * share for share in curve["token_change"]], f"{marker}-", label=task_label(task)
            )
        axes.axhline(100 * budget["max_token_change"], color="grey", linestyle=":", label="budget")
        axes.set_ylabel("tokens changed (%)")

    def price(axes: Axes) -> None:
        for name, label in (("kv_share", "KV memory"), ("prefill_flops_share", "decoder's prefill work")):
            axes.plot(layers, [100 * share for share in result[name]], "o-", label=label)
        axes.set_ylabel("% of stock vLLM")

    titles = {
        "Answer criterion: changed tokens": token_change,
        "Cost, compared with stock vLLM": price,
        "Answer criterion: divergence": answer_kl,
        "First-token criterion (published)": first_token,
    }
    return {title: _marked(draw, result) for title, draw in titles.items()}


def _marked(draw: Draw, result: dict[str, Any]) -> Draw:
    """Adds to a plot over values of K lines at those that the criteria chose."""

    def draw_marked(axes: Axes) -> None:
        draw(axes)
        for criterion, layer in result["layer"].items():
            if layer is not None:
                axes.axvline(layer, color=INK, linestyle=LINES[criterion], label=f"K, {criterion} criterion")
        label_layers(axes, "K")

    return draw_marked


def _visible(values: Sequence[float]) -> list[float]:
    return [max(value, LEAST_KL) for value in values]


def table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of a table that shows both criteria side by side, and the layers of tasks below."""
    layers, tokens = result["layers"], sum(count["tokens"] for count in result["tasks"].values())

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:34}" + "".join(f"{value:>14}" for value in values)

    def shares(name: str, values: Sequence[float]) -> str:
        at = [None if layer is None else layers.index(layer) for layer in result["layer"].values()]
        return row(name, ("" if index is None else f"{values[index]:.1%}" for index in at))

    winner, policies = _winner(result), result["policies"]
    lines = [
        *([winner, ""] if winner else []),
        f"{result['made']['samples']} samples, {tokens} answer tokens",
        "",
        row("criterion", result["layer"]),
        row(
            f"K, of {result['model']['num_hidden_layers']} layers",
            ("none" if layer is None else str(layer) for layer in result["layer"].values()),
        ),
    ]
    if any(layer is not None for layer in result["layer"].values()):
        lines.append(shares("KV memory, of stock vLLM's", result["kv_share"]))
        lines.append(shares("prefill work, of stock vLLM's", result["prefill_flops_share"]))
        for task, curve in result["curves"].items():
            lines.append(shares(f"{task}: tokens changed", curve["token_change"]))
            lines.append(shares(f"{task}: answers changed", curve["answer_change"]))
    if policies:
        lines += [
            "",
            "Other methods that take no more work, except FastV as published:",
            *policy_table(policies, {}),
        ]
    return lines + (_task_table(result) if "per_task" in result else [])


def _task_table(result: dict[str, Any]) -> list[str]:
    """The lines of a table that shows the layer of each task."""
    per_task, num_layers = result["per_task"], result["model"]["num_hidden_layers"]
    width = max(34, *(len(name) for name in per_task["tasks"]))

    def row(name: str, *values: str) -> str:
        return f"{name:{width}}" + "".join(f"{value:>14}" for value in values)

    def served(task: dict[str, Any]) -> list[str]:
        layer = str(task["layer"]) if task["layer"] < num_layers else "none"
        return [layer, *shares(task)]

    def shares(of: dict[str, Any]) -> list[str]:
        return [f"{of[name]:.1%}" for name in ("kv_share", "prefill_flops_share")]

    single = per_task["single"]
    return [
        "",
        row(f"{result['criterion']} criterion, by task", "first K", "K", "KV memory", "prefill work"),
        *(
            row(name or WITHOUT_TASK, "none" if task["own"] is None else str(task["own"]), *served(task))
            for name, task in per_task["tasks"].items()
        ),
        row("all samples", "", "", *shares(per_task["all"])),
        row("all samples, with one K", "", *(served(single) if single else ["none"])),
    ]
