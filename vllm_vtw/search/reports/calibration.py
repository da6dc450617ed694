"""The report of a calibration."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.page import MARKERS, Draw, by_layer, page

# Values below are drawn there: a logarithmic axis has no 0.
LEAST_KL = 1e-6
COLOURS = {"answer": "tab:green", "first-token": "tab:red"}


def html(result: dict[str, Any], command: str | None) -> str:
    """The report.

    Args:
        result: As `result.json` has it.
        command: How to serve the chosen K, where it can be served.
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
        for name, label in (("kv_share", "KV memory"), ("prefill_flops_share", "decoder's work in prefill")):
            axes.plot(layers, [100 * share for share in result[name]], "o-", label=label)
        axes.set_ylabel("% of stock vLLM")

    titles = {
        "First-token criterion (published)": first_token,
        "Answer criterion: divergence": answer_kl,
        "Answer criterion: other tokens": token_change,
        "What is paid": price,
    }
    return {title: _marked(draw, result) for title, draw in titles.items()}


def _marked(draw: Draw, result: dict[str, Any]) -> Draw:
    """Over values of K, with those that were chosen."""

    def both(axes: Axes) -> None:
        draw(axes)
        for criterion, layer in result["layer"].items():
            if layer is not None:
                axes.axvline(layer, color=COLOURS[criterion], alpha=0.5, label=f"K, {criterion} criterion")
        by_layer(axes, "K: visual tokens withdrawn after this many of the decoder's layers")

    return both


def _visible(values: Sequence[float]) -> list[float]:
    return [max(value, LEAST_KL) for value in values]
