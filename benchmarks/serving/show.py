# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes the tables and the plot of results again: FILE.md and FILE.png beside each FILE.json.

python -m benchmarks.serving.show FILE...
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.compare import LITTLE, Comparison, compare, read
from benchmarks.serving.models import Model

MADE_FROM = "Source"
"""The key of a plot's metadata under which the digest of its result is stored."""
Cell = Callable[[Comparison], str]
Column = tuple[str, Cell]


def pair(part: str, metric: str, form: str = "{:.2f}", scale: float = 1) -> Cell:
    """A cell with stock vLLM's mean of a metric and the plugin's.

    Args:
        part: As in `Comparison.means`.
        metric: As in `Comparison.means`.
        form: The format of a number.
        scale: What both means are multiplied by.
    """
    return lambda one: ", ".join(form.format(scale * value) for value in one.means(part, metric))


def counted(metric: str) -> Cell:
    """A cell with the sum of a metric over stock vLLM's runs, and over the plugin's."""
    return lambda one: f"{sum(run[metric] for run in one.stock):g}, {sum(run[metric] for run in one.vtw):g}"


def possible(limit: str) -> Cell:
    """A cell with one of the `Limits`. It is empty if the point has none."""
    return lambda one: "" if one.limits is None else f"{getattr(one.limits, limit):.2f}"


def faster(seconds: Callable[[Comparison], tuple[float, float]]) -> Cell:
    """A cell with stock vLLM's seconds divided by the plugin's. It is empty if the plugin took none."""

    def cell(one: Comparison) -> str:
        stock, vtw = seconds(one)
        return f"{stock / vtw:.2f}" if vtw else ""

    return cell


def speed(one: Comparison) -> str:
    return f"**{one.speed:.2f}** ({min(one.speeds):.2f} to {max(one.speeds):.2f})"


def reached(one: Comparison) -> str:
    return "" if one.limits is None else f"{one.speed / one.limits.speed:.2f}"


def possible_requests(one: Comparison) -> str:
    return possible("requests")(one) if one.short_of_memory else "all run"


def reached_requests(one: Comparison) -> str:
    if one.limits is None or not one.short_of_memory:
        return ""
    return f"{one.ratio('steps', 'mean_running') / one.limits.requests:.2f}"


TABLES: dict[str, list[Column]] = {
    "Requests answered in a second": [
        ("stock, vtw", pair("output", "request_throughput")),
        ("ratio (of each pair of runs)", speed),
        ("at most", possible("speed")),
        ("reached", reached),
        ("output tokens/s", pair("output", "output_throughput", "{:.1f}")),
        ("goodput, requests/s", pair("output", "request_goodput")),
    ],
    "Requests at once": [
        ("stock, vtw", pair("steps", "mean_running", "{:.1f}")),
        ("ratio", lambda one: f"{one.ratio('steps', 'mean_running'):.2f}"),
        ("at most", possible_requests),
        ("reached", reached_requests),
        ("most", pair("steps", "most_running", "{:.0f}")),
        ("KV blocks in use, most", pair("steps", "most_kv", "{:.0%}")),
        ("preemptions", counted("preemptions")),
        ("tokens from the prefix cache", counted("prefix_hits")),
    ],
    "Where the time goes": [
        ("prompts, s", lambda one: "{:.1f}, {:.1f}".format(*one.prompt_seconds)),
        ("times as fast", faster(lambda one: one.prompt_seconds)),
        ("at most", possible("prefill")),
        ("decoding, s", lambda one: "{:.1f}, {:.1f}".format(*one.decode_seconds)),
        ("times as fast", faster(lambda one: one.decode_seconds)),
        ("at most", possible("decode")),
        ("waiting for the model, s", pair("steps", "in_model", "{:.1f}")),
        ("steps", pair("steps", "count", "{:.0f}")),
    ],
    "Latency": [
        (f"{name} in {unit}, {which}", pair("output", f"{which}_{name.lower()}_ms", form, scale))
        for name, unit, form, scale in (
            ("TTFT", "s", "{:.2f}", 1e-3),
            ("TPOT", "ms", "{:.0f}", 1),
            ("ITL", "ms", "{:.0f}", 1),
            ("E2EL", "s", "{:.2f}", 1e-3),
        )
        for which in ("mean", "median", "p99")
    ],
}
NOTES = (
    "Pairs are stock vLLM and the plugin: means of two runs each, preemptions and cached tokens sums. "
    "Requests at once are a mean over the time in which some had not been let in. What is possible at most "
    "knows of no preemption: where stock vLLM preempts more, more may be reached. Goodput counts requests "
    "within {slo}. Where scheduling is asynchronous, waiting for the model is less than the model took."
)


def table(columns: Sequence[Column], compared: Sequence[Comparison]) -> str:
    heads = ["", *(head for head, _ in columns)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {' | '.join([one.label, *(cell(one) for _, cell in columns)])} |" for one in compared]
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """A Markdown page: what was measured, the tables, and why some ratios are low."""
    compared = compare(result)
    machine, model = result["machine"], Model(**result["model"])
    slo = ", ".join(f"{name.upper()} {value:,g} ms" for name, value in result["slo_milliseconds"].items())
    varied = any(point["workload"].get("image_side") for point in result["points"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    hardware = [f"{machine['cores']} cores of {machine['processor']}", *machine["gpus"]]
    text = [
        f"# {model.name}" + ("" if varied else f", {model.visual_tokens()} visual tokens an image"),
        f"`{result['command']}`, {result['when']}, revision {result['revision'] or 'unknown'}, {versions}; "
        f"{', '.join(hardware)}.",
        NOTES.format(slo=slo),
    ]
    for title, columns in TABLES.items():
        text += [f"## {title}", table(columns, compared)]
    low = [f"- {one.label}: {one.reason}." for one in compared if one.speed < LITTLE]
    if low:
        text += ["## Where it helps little", "\n".join(low)]
    if result["left_out"]:
        points = [result["points"][int(number)] for number in result["left_out"]]
        labels = "\n".join(
            f"- {point['sweep']}: {point['value']}: {reason}"
            for point, reason in zip(points, result["left_out"].values(), strict=True)
        )
        text += ["## Left out", labels]
    return "\n\n".join(text) + "\n"


def digest(file: Path) -> str:
    """The SHA-256 of a result's file. A plot's metadata has it, to tell which result it shows."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_tables(file: Path) -> Path:
    target = file.with_suffix(".md")
    target.write_text(tables(read(file)))
    return target


def write_plots(file: Path) -> Path:
    """Plots what was reached, what is possible, and latencies."""
    import matplotlib as mpl  # A GPU machine may lack it, and can still measure.

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    compared = compare(read(file))[::-1]
    rows = range(len(compared))
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 1.5 + 0.3 * len(compared)), sharey=True, layout="constrained"
    )
    left.barh(rows, [one.speed for one in compared], color="tab:blue")
    left.set_title("requests answered in a second")
    middle.barh(rows, [one.ratio("steps", "mean_running") for one in compared], color="tab:green")
    middle.set_title("requests at once")
    known = [(row, one.limits, one.short_of_memory) for row, one in enumerate(compared) if one.limits]
    left.plot(
        [most.speed for _, most, _ in known],
        [row for row, _, _ in known],
        "k|",
        ms=12,
        label="possible at most",
    )
    short = [(row, most) for row, most, is_short in known if is_short]
    middle.plot([most.requests for _, most in short], [row for row, _ in short], "k|", ms=12)
    for metric, style in (("median_ttft_ms", "o"), ("median_tpot_ms", "s"), ("median_e2el_ms", "^")):
        name = metric.split("_")[1].upper()
        right.plot([one.ratio("output", metric) for one in compared], rows, style, label=f"{name}, median")
    right.set_title("latency")
    left.set_yticks(rows, [one.label for one in compared])
    for axes in (left, middle, right):
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_xlabel("the plugin over stock vLLM")
        axes.grid(axis="x", alpha=0.3)
    shown = [axes.get_legend_handles_labels() for axes in (left, right)]
    handles, names = ([*first, *second] for first, second in zip(*shown, strict=True))
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    target = file.with_suffix(".png")
    plt.savefig(target, dpi=110, metadata={MADE_FROM: digest(file)})
    plt.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for file in parser.parse_args().files:
        try:
            print(write_tables(file), write_plots(file))
        except ValueError as wrong:
            parser.error(str(wrong))


if __name__ == "__main__":
    main()
