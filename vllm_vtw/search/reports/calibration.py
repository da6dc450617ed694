# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The report of `vtw calibrate`."""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.calibration_notes import WITHOUT_TASK
from vllm_vtw.search.reports.comparison import NO_RESOLUTION, plain_winner, policy_table, stages
from vllm_vtw.search.reports.page import MARKERS, Draw, label_layers, page

LEAST_KL = 1e-6
"""Smaller values are drawn at this one, because a logarithmic axis has no 0."""
COLORS = {"answer": "tab:green", "first-token": "tab:red"}


def html(result: dict[str, Any], command: str | None) -> str:
    """Renders the report of a calibration to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the chosen K. None if there is none.
    """
    given = {"result": result, "command": command, "without_task": WITHOUT_TASK}
    compared = {"shown": {}, "kept": stages, "winner": _winner(result), "no_resolution": NO_RESOLUTION}
    return page("calibration.html", _plots(result), **given, **compared)


def _winner(result: dict[str, Any]) -> str | None:
    """The sentence about a plain baseline that is better than the K that was chosen."""
    policies = result["policies"]
    return plain_winner(result, next(iter(policies)), "work") if policies else None


def _plots(result: dict[str, Any]) -> dict[str, Draw]:
    layers, budget, curves = result["layers"], result["budget"], result["curves"]

    def first_token(axes: Axes) -> None:
        axes.plot(layers, _visible(result["first_token_kl"]), "o-", label="all samples")
        axes.axhline(budget["eta"], color="grey", linestyle=":", label="eta")
        axes.set_yscale("log")
        axes.set_ylabel("KL of the first token (nats)")

    def answer_kl(axes: Axes) -> None:
        for marker, (task, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
            # The space is for tasks whose names begin with an underscore. matplotlib leaves such labels out.
            (line,) = axes.plot(layers, _visible(curve["mean_kl"]), f"{marker}-", label=f" {task}")
            axes.plot(layers, _visible(curve["p95_kl"]), "--", color=line.get_color(), alpha=0.4)
        axes.axhline(budget["max_answer_kl"], color="grey", linestyle=":", label="budget")
        axes.set_yscale("log")
        axes.set_ylabel("KL of an answer's tokens (nats)\nmean, and dashed 95th percentile")

    def token_change(axes: Axes) -> None:
        for marker, (task, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
            axes.plot(
                layers, [100 * share for share in curve["token_change"]], f"{marker}-", label=f" {task}"
            )
        axes.axhline(100 * budget["max_token_change"], color="grey", linestyle=":", label="budget")
        axes.set_ylabel("tokens changed (%)")

    def price(axes: Axes) -> None:
        for name, label in (("kv_share", "KV memory"), ("prefill_flops_share", "decoder's prefill work")):
            axes.plot(layers, [100 * share for share in result[name]], "o-", label=label)
        axes.set_ylabel("% of stock vLLM")

    titles = {
        "First-token criterion (published)": first_token,
        "Answer criterion: divergence": answer_kl,
        "Answer criterion: changed tokens": token_change,
        "Cost, compared with stock vLLM": price,
    }
    return {title: _marked(draw, result) for title, draw in titles.items()}


def _marked(draw: Draw, result: dict[str, Any]) -> Draw:
    """Adds to a plot over values of K lines at those that the criteria chose."""

    def draw_marked(axes: Axes) -> None:
        draw(axes)
        for criterion, layer in result["layer"].items():
            if layer is not None:
                axes.axvline(layer, color=COLORS[criterion], alpha=0.5, label=f"K, {criterion} criterion")
        label_layers(axes, "K: the first layer without visual tokens, counted from 0")

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
        shares("KV memory, of stock vLLM's", result["kv_share"]),
        shares("prefill work, of stock vLLM's", result["prefill_flops_share"]),
    ]
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
        row(f"{per_task['criterion']} criterion, by task", "first K", "K", "KV memory", "prefill work"),
        *(
            row(name or WITHOUT_TASK, "none" if task["own"] is None else str(task["own"]), *served(task))
            for name, task in per_task["tasks"].items()
        ),
        row("all samples", "", "", *shares(per_task["all"])),
        row("all samples, with one K", "", *(served(single) if single else ["none"])),
    ]
