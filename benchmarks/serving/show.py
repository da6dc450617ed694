"""Makes the tables and the plot of results anew: FILE.md and FILE.png beside each FILE.json.

python -m benchmarks.serving.show FILE...
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.serving.compare import Comparison, compare

mpl.use("Agg")
HELPS = 1.1
"""A ratio of requests answered in a second below which the tables say why it is no higher."""
Column = tuple[str, Callable[[Comparison], str]]


def pair(part: str, metric: str, form: str = "{:.2f}", scale: float = 1) -> Callable[[Comparison], str]:
    """A cell with stock's mean and the plugin's."""
    return lambda one: ", ".join(form.format(scale * value) for value in one.means(part, metric))


def speed(one: Comparison) -> str:
    ratio = one.ratio("output", "request_throughput")
    return f"**{ratio:.2f}** ({min(one.speeds):.2f} to {max(one.speeds):.2f})"


def reached(one: Comparison) -> str:
    return f"{one.ratio('output', 'request_throughput') / one.limits.speed:.2f}"


def possible_requests(one: Comparison) -> str:
    return f"{one.limits.requests:.2f}" if one.short_of_memory else "all run"


def reached_requests(one: Comparison) -> str:
    ratio = one.ratio("steps", "mean_running")
    return f"{ratio / one.limits.requests:.2f}" if one.short_of_memory else ""


def faster(seconds: Callable[[Comparison], tuple[float, float]]) -> Callable[[Comparison], str]:
    """A cell with how many times stock's seconds are the plugin's."""

    def cell(one: Comparison) -> str:
        stock, vtw = seconds(one)
        return f"{stock / vtw:.2f}"

    return cell


TABLES: dict[str, list[Column]] = {
    "Requests answered in a second": [
        ("stock, vtw", pair("output", "request_throughput")),
        ("ratio (by visit)", speed),
        ("at most", lambda one: f"{one.limits.speed:.2f}"),
        ("reached", reached),
        ("stock's time in prompts", lambda one: f"{one.prefill_share:.0%}"),
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
        ("preemptions", lambda one: ", ".join(f"{value:g}" for value in one.preemptions)),
    ],
    "Where the time goes": [
        ("prompts, s", lambda one: "{:.1f}, {:.1f}".format(*one.prompt_seconds)),
        ("times as fast", faster(lambda one: one.prompt_seconds)),
        ("at most", lambda one: f"{one.limits.prefill:.2f}"),
        ("decoding, s", lambda one: "{:.1f}, {:.1f}".format(*one.decode_seconds)),
        ("times as fast", faster(lambda one: one.decode_seconds)),
        ("at most", lambda one: f"{one.limits.requests:.2f}"),
        ("waiting for the model, s", pair("steps", "in_model", "{:.1f}")),
        ("steps", pair("steps", "count", "{:.0f}")),
    ],
    "Latency": [
        ("TTFT in s, median", pair("output", "median_ttft_ms", scale=1e-3)),
        ("P99", pair("output", "p99_ttft_ms", scale=1e-3)),
        ("TPOT in ms, median", pair("output", "median_tpot_ms", "{:.0f}")),
        ("P99", pair("output", "p99_tpot_ms", "{:.0f}")),
        ("ITL in ms, median", pair("output", "median_itl_ms", "{:.0f}")),
        ("P99", pair("output", "p99_itl_ms", "{:.0f}")),
        ("E2EL in s, median", pair("output", "median_e2el_ms", scale=1e-3)),
        ("P99", pair("output", "p99_e2el_ms", scale=1e-3)),
    ],
}


def table(columns: Sequence[Column], compared: Sequence[Comparison]) -> str:
    heads = ["", *(head for head, _ in columns)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {' | '.join([one.label, *(cell(one) for _, cell in columns)])} |" for one in compared]
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """Markdown: what was measured on what, the tables, and why some ratios are low."""
    compared = compare(result)
    machine, model = result["machine"], result["model"]
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    slo = ", ".join(f"{name.upper()} {value:,g} ms" for name, value in result["slo_milliseconds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = [
        f"# {model['name']}, {result['visual_tokens']} visual tokens an image",
        f"`{result['command']}`, {result['when']}, revision {result['revision'] or 'unknown'}, {versions}; "
        f"{machine['cores']} cores of {machine['processor']}{gpus}.",
        f"Pairs are stock vLLM and the plugin, means of {len(compared[0].stock)} runs each. Goodput counts "
        f"requests within {slo}. Requests at once are a mean over the time in which some had not been let "
        "in. What is possible at most knows of no preemption: where stock vLLM preempts, more may be reached.",
    ]
    for title, columns in TABLES.items():
        text += [f"## {title}", table(columns, compared)]
    low = [one for one in compared if one.ratio("output", "request_throughput") < HELPS]
    if low:
        text += ["## Where it helps little", "\n".join(f"- {one.label}: {one.reason}" for one in low)]
    return "\n\n".join(text) + "\n"


def write_tables(file: Path) -> Path:
    target = file.with_suffix(".md")
    target.write_text(tables(json.loads(file.read_text())))
    return target


def write_plots(file: Path) -> Path:
    """One plot: what was reached beside what is possible, and latencies."""
    compared = compare(json.loads(file.read_text()))[::-1]
    rows = range(len(compared))
    _, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 1 + 0.3 * len(compared)), sharey=True, layout="constrained"
    )
    left.barh(rows, [one.ratio("output", "request_throughput") for one in compared], color="tab:blue")
    left.plot([one.limits.speed for one in compared], rows, "k|", markersize=12, label="possible")
    left.set_title("requests answered in a second")
    middle.barh(rows, [one.ratio("steps", "mean_running") for one in compared], color="tab:green")
    short = [row for row in rows if compared[row].short_of_memory]
    middle.plot(
        [compared[row].limits.requests for row in short], short, "k|", markersize=12, label="possible"
    )
    middle.set_title("requests at once")
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
        axes.legend()
    target = file.with_suffix(".png")
    plt.savefig(target, dpi=110)
    plt.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for file in parser.parse_args().files:
        print(write_tables(file), write_plots(file))


if __name__ == "__main__":
    main()
