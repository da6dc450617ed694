# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Renders a report as one HTML file that contains its plots."""

import io
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FunctionLoader, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MARKERS = "osD^vP*Xdh<>"
Draw = Callable[[Axes], None]
"""Draws a plot."""


def page(template: str, plots: Mapping[str, Draw], **values: Any) -> str:
    """Renders a template to HTML.

    Args:
        template: The name of a template file in this package.
        plots: For each plot's title, the function that draws it. The template gets the plots as `plots`.
        values: The other values that the template shows.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
    )
    # Task names come from users. Without this, matplotlib takes text between dollar signs for a formula.
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        drawn = [Markup(_svg(title, draw)) for title, draw in plots.items()]
    return environment.get_template(template).render(plots=drawn, **values)


def label_layers(axes: Axes, label: str) -> None:
    """Labels the x axis, and gives it ticks at whole numbers only, for layers or epochs."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(title: str, draw: Draw) -> str:
    """A plot as an SVG element."""
    figure = Figure(figsize=(6.4, 4))
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
