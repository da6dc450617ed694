"""The report of a calibration: one HTML file with its plots inside."""

import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Values below are drawn there: a logarithmic axis has no 0.
LEAST_KL = 1e-6
MARKERS = "osD^vP*Xdh<>"
COLOURS = {"answer": "tab:green", "first-token": "tab:red"}


def html(result: dict[str, Any], command: str | None) -> str:
    """The report.

    Args:
        result: As `result.json` has it.
        command: How to serve the chosen K, where it can be served.
    """
    environment = Environment(autoescape=select_autoescape(default=True), trim_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(result=result, command=command, plots=[Markup(plot) for plot in _plots(result)])


def _plots(result: dict[str, Any]) -> list[str]:
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
    # Labels are users' words: a dollar begins no formula, and, behind a space, an underscore hides none.
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        return [_svg(title, draw, result) for title, draw in titles.items()]


def _visible(values: Sequence[float]) -> list[float]:
    return [max(value, LEAST_KL) for value in values]


def _svg(title: str, draw: Callable[[Axes], None], result: dict[str, Any]) -> str:
    figure = Figure(figsize=(6.4, 4))
    axes = figure.add_subplot()
    draw(axes)
    for criterion, layer in result["layer"].items():
        if layer is not None:
            axes.axvline(layer, color=COLOURS[criterion], alpha=0.5, label=f"K, {criterion} criterion")
    axes.set_title(title)
    axes.set_xlabel("K: visual tokens withdrawn after this many of the decoder's layers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
