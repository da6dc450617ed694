"""The report of a calibration."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import MARKERS, Draw, by_layer, page
from vllm_vtw.search.vtw.criteria import FIRST_LAYER

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


def notes(result: dict[str, Any], criterion: str, unseen: Collection[str]) -> list[str]:
    """What a reader has to know beside the numbers; `unseen` are tasks without a good sample."""
    said = []
    layers, layer, most = result["layers"], result["layer"][criterion], result["budget"]["max_token_change"]
    if layer is None:
        said.append(
            f"No K that was looked at satisfies the {criterion} criterion, so there is no policy file: "
            "look at other --layers, allow more, or serve without withdrawal."
        )
        if criterion == "first-token":
            deepest = [
                f"{result['first_token_kl'][-1]:.2g} nats, where {result['budget']['eta']:g} are allowed"
            ]
        else:
            deepest = [
                f"{task} {curve['token_change'][-1]:.2%} of the tokens and {curve['mean_kl'][-1]:.2g} nats"
                for task, curve in result["curves"].items()
            ]
        said.append(f"What is left at K = {layers[-1]}: {', '.join(deepest)}.")
    elif result["kv_share"][layers.index(layer)] >= 1:
        said.append(
            f"At K = {layer} the padding of vLLM's KV-cache groups takes more memory than withdrawal saves: "
            "allow more, or serve without withdrawal."
        )
    said += data_notes(result, most, unseen)
    published = [layer for layer in layers if layer >= FIRST_LAYER]
    if not published or published != list(range(FIRST_LAYER, published[-1] + 1)):
        looked_at = ", ".join(map(str, published)) or "none"
        said.append(
            f"As published, the first-token criterion looks at every K from {FIRST_LAYER} on; "
            f"here it looked at {looked_at}."
        )
    return said


def table(result: dict[str, Any]) -> list[str]:
    """Both criteria side by side, in lines."""
    layers, tokens = result["layers"], sum(count["tokens"] for count in result["tasks"].values())

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:34}" + "".join(f"{value:>14}" for value in values)

    def shares(name: str, values: Sequence[float]) -> str:
        at = [None if layer is None else layers.index(layer) for layer in result["layer"].values()]
        return row(name, ("" if index is None else f"{values[index]:.1%}" for index in at))

    lines = [
        f"{result['made']['samples']} samples, {tokens} tokens of answers",
        "",
        row("criterion", result["layer"]),
        row(
            f"K, of {result['model']['num_hidden_layers']} layers",
            ("none" if layer is None else str(layer) for layer in result["layer"].values()),
        ),
        shares("KV memory, of stock vLLM's", result["kv_share"]),
        shares("decoder's work in prefill", result["prefill_flops_share"]),
    ]
    for task, curve in result["curves"].items():
        lines.append(shares(f"{task}: tokens changed", curve["token_change"]))
        lines.append(shares(f"{task}: answers changed", curve["answer_change"]))
    return lines
