"""A report as one HTML file, with its plots inside."""

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


def page(template: str, plots: Mapping[str, Draw], **told: Any) -> str:
    """The page.

    Args:
        template: File of this package.
        plots: What draws each, by title.
        told: What the template shows beside `plots`.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
    )
    # Labels are users' words: a dollar begins no formula, and, behind a space, an underscore hides none.
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        drawn = [Markup(_svg(title, draw)) for title, draw in plots.items()]
    return environment.get_template(template).render(plots=drawn, **told)


def by_layer(axes: Axes, label: str) -> None:
    """Makes the x axis one of layers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(title: str, draw: Draw) -> str:
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
