# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Plots the course of the training, and what each K, schedules, rankings and gates cost in answers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality.model import LAYERS
from benchmarks.quality.tasks import TASKS

mpl.use("Agg")
STYLES = dict(zip(TASKS, ("o-", "s-", "^-", "v-", "D--", "P--"), strict=True))


def _finish(axes: Axes, path: Path) -> None:
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=110, bbox_inches="tight")  # type: ignore[union-attr]
    plt.close()


def plot_training(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plots loss and accuracies over the steps of the training.

    Args:
        records: The log of the training.
        path: The image file to write.
    """
    steps = [record["step"] for record in records]
    _, (above, below) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, height_ratios=(1, 2))
    for name, label in (("train_loss", "training, weighted by answer"), ("loss", "validation, by token")):
        above.plot(steps, [record[name] for record in records], label=label)
    above.set_ylabel("cross-entropy")
    above.set_yscale("log")
    above.grid(alpha=0.3)
    above.legend()
    for task in TASKS:
        below.plot(steps, [100 * record[task] for record in records], label=task)
    below.set_xlabel("step")
    _finish(below, path)


def plot_layers(right: Mapping[int, dict[str, float]], path: Path) -> None:
    """Plots the accuracy of each task over K.

    Args:
        right: The fraction of right answers, by K and task. K = L is stock vLLM.
        path: The image file to write.
    """
    _, axes = plt.subplots(figsize=(8, 5))
    ks = sorted(right)
    for task, style in STYLES.items():
        axes.plot(ks, [100 * right[k][task] for k in ks], style, label=task)
    axes.set_xticks(ks, [f"{k}\n(stock)" if k == LAYERS else str(k) for k in ks])
    axes.set_xlabel("K: visual tokens withdrawn after this many of the decoder's layers")
    _finish(axes, path)


def plot_schedules(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the mean accuracy of the tasks over the decoder's work, with a marker for each method."""
    _over_work(rows, lambda row: row["schedule"].split(",")[0], "*osD^v", path)


def plot_rankings(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the mean accuracy of the tasks over the decoder's work, with a line for each ranking and VTW."""
    styles = ("k*", "o-", "s--", "D--", "^-", "v-", "P-", "X-")
    _over_work(rows, lambda row: row["method"], styles, path)


def plot_exits(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the mean accuracy of the tasks over the decoder's work, for VTW and for gates."""

    def kind(row: Mapping[str, Any]) -> str:
        return f"gates before {', '.join(map(str, row['layers']))}" if row["layers"] else "VTW"

    _over_work(rows, kind, ("o-", "s-", "D-"), path)


def _over_work(
    rows: Sequence[Mapping[str, Any]],
    kind: Callable[[Mapping[str, Any]], str],
    styles: Sequence[str],
    path: Path,
) -> None:
    _, axes = plt.subplots(figsize=(8, 5))
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = 100 * row["prefill_flops_share"], 100 * mean(row["engine"]["right"].values())
        kinds.setdefault(kind(row), []).append(point)
    for style, (label, points) in zip(styles, kinds.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), style, label=label, markersize=8)
    axes.set_xlabel("decoder's work on a prompt (% of stock vLLM)")
    _finish(axes, path)
