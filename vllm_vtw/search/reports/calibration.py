# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The report of `vtw calibrate`."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import MARKERS, Draw, label_layers, page
from vllm_vtw.search.vtw.criteria import FIRST_LAYER_TRIED

LEAST_KL = 1e-6
"""Smaller values are drawn at this one, because a logarithmic axis has no 0."""
COLORS = {"answer": "tab:green", "first-token": "tab:red"}


def html(result: dict[str, Any], command: str | None) -> str:
    """Renders the report of a calibration to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the chosen K. None if there is none.
    """
    return page("calibration.html", _plots(result), result=result, command=command)


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


def notes(result: dict[str, Any], criterion: str, tasks_without_sample: Collection[str]) -> list[str]:
    """Returns what a reader has to know in addition to the numbers.

    Args:
        result: The content of `result.json`.
        criterion: The criterion whose K is used, "answer" or "first-token".
        tasks_without_sample: The tasks of which no good sample was drawn.
    """
    said = []
    raise_budget = (
        "raise --eta" if criterion == "first-token" else "raise --max-answer-kl or --max-token-change"
    )
    layers, layer, most = result["layers"], result["layer"][criterion], result["budget"]["max_token_change"]
    if layer is None:
        measured_all = layers[-1] == result["model"]["num_hidden_layers"] - 1
        larger = "" if measured_all else "measure larger values with --layers, "
        said.append(
            f"No K that was measured satisfies the {criterion} criterion, so there is no policy file: "
            f"{larger}{raise_budget}, or serve without withdrawal."
        )
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
        said.append(f"The difference at K = {layers[-1]}, the largest measured: {'; '.join(deepest)}.")
    elif result["kv_share"][layers.index(layer)] >= 1:
        said.append(
            f"At K = {layer} KV-cache groups waste at least as much memory as withdrawal saves: "
            f"{raise_budget} to allow a smaller K, or serve without withdrawal."
        )
    said += data_notes(result, most, tasks_without_sample)
    published = [layer for layer in layers if layer >= FIRST_LAYER_TRIED]
    if not published or published != list(range(FIRST_LAYER_TRIED, published[-1] + 1)):
        considered = ", ".join(map(str, published)) or "none"
        said.append(
            f"As published, the first-token criterion considers every K from {FIRST_LAYER_TRIED} on; "
            f"here it considered {considered}."
        )
    return said


def table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of a table that shows both criteria side by side."""
    layers, tokens = result["layers"], sum(count["tokens"] for count in result["tasks"].values())

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:34}" + "".join(f"{value:>14}" for value in values)

    def shares(name: str, values: Sequence[float]) -> str:
        at = [None if layer is None else layers.index(layer) for layer in result["layer"].values()]
        return row(name, ("" if index is None else f"{values[index]:.1%}" for index in at))

    lines = [
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
    return lines
