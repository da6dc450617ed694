# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Finds what is wrong with a report as a browser shows it."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]
LAYOUT = Path(__file__).with_suffix(".js").read_text()
BOXES = """(plots) => [...plots.querySelectorAll("figure")].map((figure) => {
    const box = (element) => element.getBoundingClientRect(), part = (name) => figure.querySelector(name);
    const plot = box(part("svg")), bottom = box(part("[id^=legend]")).top, origin = box(plots);
    const [left, right] = [plot.left, plot.right].map((x) => x - origin.left);
    return [part("figcaption").textContent, left, right, plot.top - origin.top, bottom - origin.top];
})"""
"""Returns the title of each plot and where it is drawn, from the left, right and top to the legend."""
LEAST_COLOR = 0.0003
"""The least share of a plot that has to be drawn in colors, in which its curves and points are."""


def faults(browser: Browser, report: Path, scheme: Scheme, width: int) -> list[str]:
    """Opens a report. Returns what is wrong with it, one sentence each.

    Args:
        browser: A browser.
        report: An HTML file.
        scheme: The color scheme that the reader prefers.
        width: The width of the window, in pixels.
    """
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True)
    page = context.new_page()
    asked: list[str] = []
    said: list[tuple[str, str]] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append((message.type, message.text)))
    page.on("pageerror", lambda error: said.append(("error", error.message)))
    page.goto(report.as_uri())
    found = page.evaluate(LAYOUT) + _empty_plots(page)
    context.close()
    found += [f"asks for {url}" for url in asked if url != report.as_uri()]
    return found + [f"console: {text}" for kind, text in said if kind == "error"]


def _empty_plots(page: Page) -> list[str]:
    """The plots in which nothing is drawn but axes. What the legend shows does not count."""
    if not page.locator(".plots svg").count():
        return ["there are no plots"]
    plots = page.locator(".plots")
    screen = np.asarray(Image.open(io.BytesIO(plots.screenshot())).convert("RGB")).astype(int)
    boxes = plots.evaluate(BOXES)
    empty = []
    for title, *box in boxes:
        left, right, top, bottom = map(round, box)
        plot = screen[top:bottom, left:right]
        # Axes and their text have the color of the page's text, which is nearly grey.
        colored = plot.max(2) - plot.min(2) > 60
        if colored.size == 0 or colored.mean() < LEAST_COLOR:
            empty.append(f"nothing is drawn in the plot: {title}")
    return empty
