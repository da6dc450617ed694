# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Draws the dashboard from the metrics of a server under load.

    python -m tools.dashboard_picture [--seconds 240] [--out docs/pictures/dashboard.png]

It trains gates for the small trained LLaVA, serves it with them and with a guard, and sends questions, some
of which name their task. Prometheus, of Debian's package `prometheus`, reads the server's metrics and answers
the dashboard's queries. matplotlib draws the answers in the dashboard's grid.
"""

import argparse
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from openai import OpenAI
from PIL import Image

from benchmarks.demo import OPTIONS, data_url, trained_gates
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS, Question, samples
from benchmarks.server import Server, ServerError, serving
from tools.dashboard import ALERTS, filled_in, panels
from tools.prometheus import Prometheus, PrometheusError, scraping

mpl.use("Agg")
OUT = Path("docs") / "pictures" / "dashboard.png"
FOOTER = (
    "Drawn by matplotlib from the queries of deploy/monitoring/dashboard.json, which a Prometheus answered. "
    "In Grafana, it looks different.\n"
    "A small LLaVA of 12 layers on the CPU, with gates and a guard, under a load that comes and goes."
)
LAYER_BY_TASK = {"presence": 6, "relation": 8, "ocr": 10, "caption": LAYERS}
"""The tasks that requests name, and their layers. About other requests, gates decide."""
SHARE = 0.1
"""The guard's share."""
CLIENTS = 48
"""The number of clients at the most. It swings between a sixth of it and all."""
PAUSE = 0.4
"""How long a client waits between two questions, in seconds."""
PERIOD = 80.0
"""The seconds from one peak of the load to the next."""
RATE_INTERVAL, STEP = "20s", 2.0
WIDTH, ROW = 12.0, 0.27
"""The picture's width, and the height of a row of the dashboard's grid, in inches."""
COLUMNS = 24
"""The columns of Grafana's grid."""


@dataclass(frozen=True)
class Line:
    """A series of a panel.

    Attributes:
        name: Its name in the legend.
        times: Seconds since the beginning of the picture.
        values: Its values.
    """

    name: str
    times: list[float]
    values: list[float]


def policy_with_tasks(folder: Path) -> Path:
    """Trains gates, and lets requests name tasks. Returns the policy file."""
    file = trained_gates(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": LAYER_BY_TASK}))
    return file


def send_questions(server: Server, seconds: float) -> None:
    """Sends questions for a time, from a number of clients that rises and falls."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    asked = [sample for task in TASKS for sample in islice(samples("test", task), 20)]
    numbered = zip(count(), cycle(asked[::7] + asked[::-3]))
    started = time.monotonic()

    def ask_again_and_again(number: int) -> None:
        while (at := time.monotonic() - started) < seconds:
            if number < CLIENTS * (7 - 5 * math.cos(2 * math.pi * at / PERIOD)) / 12:
                ask(client, model, *next(numbered))
            time.sleep(PAUSE)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask_again_and_again, range(CLIENTS)))


def ask(client: OpenAI, model: str, number: int, sample: tuple[Image.Image, Question]) -> None:
    """Asks one question. Half of those of a task with a layer name the task."""
    picture, question = sample
    names_task = question.task in LAYER_BY_TASK and number % 2
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": question.text},
    ]
    client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_completion_tokens=MAX_ANSWER_TOKENS,
        temperature=0,
        extra_body={"vllm_xargs": {"vtw_task": question.task} if names_task else {}},
    )


def lines(prometheus: Prometheus, panel: Mapping[str, Any], start: float, end: float) -> Iterator[Line]:
    """The series that Prometheus has for a panel.

    Args:
        prometheus: The server that answers.
        panel: The panel, as the dashboard has it.
        start: The first moment, in seconds since the epoch.
        end: The last moment.
    """
    for target in panel["targets"]:
        query = filled_in(target["expr"], RATE_INTERVAL)
        for series in prometheus.query_range(query, start, end, STEP):
            name = legend(target["legendFormat"], series["metric"])
            times, values = zip(*series["values"], strict=True)
            yield Line(name, [at - start for at in times], [float(value) for value in values])


def legend(template: str, labels: Mapping[str, str]) -> str:
    """The name of a series, from Grafana's template for it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], ""), template)


def draw(shown: Sequence[tuple[Mapping[str, Any], Sequence[Line]]], file: Path) -> None:
    """Draws panels in the dashboard's grid.

    Args:
        shown: The panels and their series.
        file: The image file to write.
    """
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in shown) + 2
    figure = plt.figure(figsize=(WIDTH, rows * ROW), facecolor="#f4f5f5")
    for panel, series in shown:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        corner = (x + 0.1) / COLUMNS, 1 - (y + h - 0.1) / rows
        width, height = (w - 0.2) / COLUMNS, (h - 0.2) / rows
        card = plt.Rectangle(corner, width, height, facecolor="white", edgecolor="#d8d9da", zorder=-1)
        figure.add_artist(card)
        axes = figure.add_axes(
            ((x + 1.3) / COLUMNS, 1 - (y + h - 2.2) / rows, (w - 1.7) / COLUMNS, (h - 3.7) / rows)
        )
        axes.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
        draw_panel = draw_heatmap if panel["type"] == "heatmap" else draw_lines
        draw_panel(axes, series, panel["fieldConfig"]["defaults"]["unit"])
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MultipleLocator(30))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at) // 60}:{int(at) % 60:02}"))
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    figure.text(0.01, 0.4 / rows, FOOTER, fontsize=8, color="#555555")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A palette makes the file a quarter as large.
    Image.open(drawn).convert("RGB").quantize(256, kmeans=2).save(file, optimize=True)


def draw_lines(axes: Axes, series: Sequence[Line], unit: str) -> None:
    for line in series:
        axes.plot(line.times, line.values, label=line.name, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    formats = {"percentunit": "{:.0%}", "reqps": "{:g} req/s", "short": "{:g}"}
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats[unit].format(round(value, 6))))
    wide = axes.get_position().width > 0.5
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.03, -0.1),
        ncols=8 if wide else 4,
        fontsize=7,
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


def draw_heatmap(axes: Axes, series: Sequence[Line], _: str) -> None:
    """Draws the buckets of a histogram, whose series count what is in a bucket or in one before it."""
    ascending = sorted(series, key=lambda line: float(line.name))
    cumulative = np.array([line.values for line in ascending])
    counts = np.diff(cumulative, axis=0, prepend=0)
    finite = [number for number, line in enumerate(ascending) if math.isfinite(float(line.name))]
    shade = axes.pcolormesh(ascending[0].times, range(len(finite)), counts[finite], cmap="Oranges", vmin=0)
    axes.set_yticks(range(len(finite)), [ascending[number].name for number in finite])
    bar = axes.figure.colorbar(shade, ax=axes, pad=0.01, fraction=0.02)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws the dashboard of a server under load.")
    parser.add_argument("--seconds", type=float, default=240, help="how long it sends questions (240)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the image file ({OUT})")
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        vtw = {"policy": str(policy_with_tasks(Path(folder))), "guard": {"share": SHARE}}
        options = ["--model-impl=vtw", f"--additional-config={json.dumps({'vtw': vtw})}"]
        with serving(CHECKPOINT, *OPTIONS, *options) as server, scraping(server.url, ALERTS) as prometheus:
            started = time.time()
            send_questions(server, args.seconds)
            ended = time.time()
            shown = [(panel, [*lines(prometheus, panel, started, ended)]) for panel in panels()]
    if without := [panel["title"] for panel, series in shown if not series]:
        sys.exit(f"no data for {', '.join(without)}")
    draw(shown, args.out)
    print(f"{args.out}: {len(shown)} panels, {args.out.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has stopped the server.
    except (PrometheusError, ServerError) as failure:
        sys.exit(str(failure))
