# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Renders a report as one HTML file that contains its plots."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from math import ceil, floor, log10
from textwrap import fill
from typing import Any

import matplotlib as mpl
from cycler import cycler
from jinja2 import Environment, FunctionLoader, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

MARKERS = "osD^vP*Xdh<>"
INK = "#010203"
"""Stands in plots for the color of the page's text, which is another one on a dark page."""
COLORS = ["#2f80d0", "#d8680c", "#2a9347", "#e04545", "#9567d6", "#a4705c", "#d4519a", "#1593a5"]
"""Colors of lines. Each has a contrast of at least 3.5 to 1 with a light page, and with a dark one."""
STYLE: dict[Any, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "lines.markersize": 5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    # Task names come from users. Without this, matplotlib takes text between dollar signs for a formula.
    "text.parse_math": False,
}
LEGEND_WIDTH = 48
"""About as many characters fit into a line below a plot."""
Draw = Callable[[Axes], None]
"""Draws a plot."""
Price = Sequence[tuple[str, str]]
"""Numbers with their units, and in words what they are of."""


def page(
    template: str,
    result: Mapping[str, Any],
    choice: str,
    price: Price,
    plots: Mapping[str, Draw],
    **values: Any,
) -> str:
    """Renders a template to HTML.

    Args:
        template: The name of a template file in this package.
        result: The content of `result.json`.
        choice: What was found, in one sentence.
        price: What it costs. Empty if nothing was found.
        plots: For each plot's title, the function that draws it.
        values: The other values that the template shows.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
    )
    environment.globals["percent"] = lambda share: f"{100 * share:.1f}"
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The browser has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn = {title: Markup(_svg(draw)) for title, draw in plots.items()}
    made = result["made"]
    settings = made | result.get("budget", {}) | made["versions"]
    del settings["versions"]
    given = {"result": result, "choice": choice, "price": price, "plots": drawn, "settings": settings}
    return environment.get_template(template).render(**given, **values)


def price_of(costs: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> Price:
    """What a policy costs.

    Args:
        costs: Its `kv_share` and its `prefill_flops_share`, as in `result.json`.
        changes: For each task, its `token_change` and its `answer_change`.
    """

    def worst(change: str, what: str) -> tuple[str, str]:
        share, task = max((changed[change], task) for task, changed in changes.items())
        return f"{share:.1%}", f"of {what} change on {f'the worst task, {task}' if share else 'any task'}"

    return [worst("token_change", "answer tokens"), worst("answer_change", "answers"), *stock_shares(costs)]


def stock_shares(costs: Mapping[str, Any]) -> Price:
    """What KV memory and work cost, given as `kv_share` and `prefill_flops_share` in `result.json`."""
    return [
        (f"{costs['kv_share']:.1%}", "of stock vLLM's KV memory"),
        (f"{costs['prefill_flops_share']:.1%}", "of stock vLLM's prefill work"),
    ]


def task_label(task: str) -> str:
    """The label of a task's curve. matplotlib leaves labels out that begin with an underscore."""
    return f" {task}"


def label_layers(axes: Axes, label: str) -> None:
    """Labels the x axis, and gives it ticks at whole numbers only, for layers or epochs."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def scale_by_powers(axes: Axes) -> None:
    """Makes the y axis logarithmic, from one power of ten to another, labelled with plain numbers.

    What the plot shows has to be drawn before.
    """
    axes.set_yscale("log")
    low, high = map(log10, axes.get_ylim())
    axes.set_ylim(10 ** floor(low), 10 ** ceil(high))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(draw: Draw) -> str:
    """A plot, with its legend below it, as an SVG element."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    handles, names = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, names)) <= LEGEND_WIDTH // 2 else 1
    labels = [fill(name, LEGEND_WIDTH) for name in names]
    lines = ceil(len(labels) / columns) + sum(label.count("\n") for label in labels)
    figure.set_size_inches(4.5, 2.8 + 0.19 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
