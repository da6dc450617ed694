# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what searched schedules cost in answers, compared with VTW and FastV at no more decoder work.

    python -m benchmarks.quality.schedules [--searched 128] [--samples 200] [--check 50] [--out FILE.json]

It searches on the validation split of all tasks, with `vtw gsearch` at three budgets of changes to answers,
and with `vtw psigmoid` at three budgets of work. The accuracies are those of the engine on the test split.
With `--check`, the transformers reference reads that many answers to each task, and the benchmark fails if it
would have given other ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.data import write_data
from benchmarks.quality.evaluate import TIE, Answer, Sample, Score, engine_answers, percent, positive, score
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.plots import plot_schedules
from benchmarks.quality.tasks import TASKS, samples
from vllm_vtw.policy import BY_IMAGE, BY_QUESTION, Policy, Stage

CHANGES = (0.001, 0.01, 0.05)
"""Budgets of G-Search. Each limits both the mean KL, in nats, and the fraction of tokens that change."""
WORK = (0.8, 0.65, 0.5)
"""Budgets of P-Sigmoid, as fractions of the full decoder's work on a prompt."""
SEARCHES = {
    **{
        f"G-Search, {most:g}": ["gsearch", f"--max-answer-kl={most}", f"--max-token-change={most}"]
        for most in CHANGES
    },
    **{f"P-Sigmoid, {budget:g}": ["psigmoid", f"--budget={budget}", "--trials=40"] for budget in WORK},
}
POINT = 0.01
"""A schedule is as good as stock vLLM if its mean accuracy is at most this much lower."""


def searched(command: Sequence[str], data: Path, number: int, out: Path) -> dict[str, Any]:
    """Runs a search. Returns the result that it prints as JSON.

    Args:
        command: The command and its options.
        data: The data file.
        number: The number of samples.
        out: The command's folder for results.
    """
    options = {"data": data, "limit": number, "max-tokens": MAX_ANSWER_TOKENS, "out": out}
    vtw = str(Path(sys.executable).with_name("vtw"))
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [vtw, *command, str(CHECKPOINT), "--json", *flags], stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def largest_gap(schedule: Mapping[int, float], answered: Sequence[tuple[Sample, Answer]]) -> float:
    """The largest number of logits by which the reference prefers another token to the engine's.

    Args:
        schedule: The fraction of visual tokens from each layer on, by layer.
        answered: Samples and the engine's answers.
    """
    from tests.engine.reference import Reference

    oracle, gaps = Reference(CHECKPOINT), [0.0]
    for (picture, _), answer in tqdm(answered, desc="reference"):
        ids = answer.prompt + answer.said
        logits = oracle.ranked_logits(ids, [oracle.embeds(picture)], schedule, len(answer.prompt))[:-1]
        chosen = logits[range(len(answer.said)), answer.said]
        gaps.append(float((logits.max(-1).values - chosen).max()))
    return max(gaps)


def mean_right(row: Mapping[str, Any]) -> float:
    """The fraction of right answers, as a mean over tasks."""
    return mean(row["engine"]["right"].values())


def beside_vtw(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """By how much `mean_right` of a row is above that of VTW at no more work. None if there is none."""
    vtw = [
        other for other in rows if other["search"] == row["search"] and other["schedule"].startswith("VTW")
    ]
    own = row["schedule"].startswith(("G-Search", "P-Sigmoid", "FastV, "))
    return mean_right(row) - mean_right(vtw[0]) if vtw and own else None


def least_work(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """A sentence about a method's schedule with the least work that stays within a point of stock vLLM."""
    stock = rows[0]
    within = [
        row
        for row in rows
        if row["schedule"].startswith(method) and mean_right(row) >= mean_right(stock) - POINT
    ]
    if not within:
        return f"{method}: no schedule of these stays within a point of stock vLLM, mean over tasks."
    best = min(within, key=lambda row: row["prefill_flops_share"])
    work, kv = (100 * best[share] for share in ("prefill_flops_share", "kv_share"))
    lost = {task: stock["engine"]["right"][task] - right for task, right in best["engine"]["right"].items()}
    worst = max(lost, key=lambda task: lost[task])
    return (
        f"{method}: within a point of stock vLLM, mean over tasks, at {work:.1f}% of its work and {kv:.1f}% "
        f"of its KV memory ({best['schedule']}); {worst} loses most, {100 * lost[worst]:.1f} points."
    )


def against_vtw(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence about which searches beat VTW and which do not."""
    above = {
        row["schedule"]: beside_vtw(row, rows)
        for row in rows
        if row["schedule"] == row["search"] and row["search"]
    }
    beats = [name for name, value in above.items() if value is not None and value > 0]
    does_not = [name for name, value in above.items() if value is not None and value <= 0]
    return (
        f"At no more work, mean over tasks, VTW is beaten by {', '.join(beats) or 'none'}, and not by "
        f"{', '.join(does_not) or 'none'}."
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of work, KV memory and accuracies in percent, and sentences that summarise it.

    Work and KV memory are relative to stock vLLM's.
    """
    head = ["searched", "schedule", "work", "KV", *TASKS, "caption, objects", "mean", "above VTW"]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for row in rows:
        above = beside_vtw(row, rows)
        cells = [f"{100 * share:.1f}" for share in (row["prefill_flops_share"], row["kv_share"])]
        cells += [*percent(Score(**row["engine"])), f"{100 * mean_right(row):.1f}"]
        cells += ["" if above is None else f"{100 * above:+.1f}"]
        lines.append(f"| {' | '.join([row['search'], row['schedule'], *cells])} |")
    methods = ("G-Search", "P-Sigmoid", "VTW", "FastV")
    said = [against_vtw(rows), *(least_work(rows, method) for method in methods)]
    return "\n".join([*lines, "", *(f"- {line}" for line in said)])


def measured(
    policy: Mapping[str, Any], model: dict[str, Any], asked: Sequence[Sample], check: int
) -> dict[str, Any]:
    """Serves a policy, and returns the score of its answers.

    Args:
        policy: The policy, as the search's result contains it.
        model: What a policy file says about the model.
        asked: The images and questions.
        check: The number of answers to each task that the reference reads. 0 for none.
    """
    stages = tuple(Stage(**stage) for stage in policy["stages"])
    served = Policy(stages, ranked_by=policy["ranking"] or BY_QUESTION[0])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "policy.json"
        file.write_text(json.dumps(served.to_json(model)))
        given = engine_answers(CHECKPOINT, {"policy": str(file), "align": False}, asked)
    found: dict[str, Any] = {"engine": asdict(score(asked, given))}
    if check and served.ranking not in BY_IMAGE:
        by_task = groupby(zip(asked, given, strict=True), lambda one: one[0][1].task)
        read = [pair for _, pairs in by_task for pair in islice(pairs, check)]
        found["largest_gap"] = largest_gap({stage.layer: stage.keep for stage in stages}, read)
    return found


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--searched", type=positive, default=128, help="samples of the validation split")
    parser.add_argument("--samples", type=positive, default=200, help="of each task, of the test split")
    parser.add_argument("--check", type=positive, default=0, help="answers to each task for the reference")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table and a plot beside it")
    options = parser.parse_args()
    asked = [sample for task in TASKS for sample in islice(samples("test", task), options.samples)]
    stock: dict[str, Any] = {"search": "", "schedule": "stock", "prefill_flops_share": 1.0, "kv_share": 1.0}
    rows = [stock | {"stages": [], "engine": asdict(score(asked, engine_answers(CHECKPOINT, None, asked)))}]
    known: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        data = write_data(Path(folder), list(TASKS), options.searched)
        for name, command in SEARCHES.items():
            started = time.monotonic()
            result = searched(command, data, options.searched, Path(folder) / name)
            seconds[name] = round(time.monotonic() - started, 1)
            for schedule, policy in result["policies"].items():
                key = json.dumps([policy["stages"], policy["ranking"]])
                if key not in known:
                    known[key] = measured(policy, result["model"], asked, options.check)
                row = {"search": name, "schedule": name if schedule == result["method"] else schedule}
                row |= {share: policy[share] for share in ("prefill_flops_share", "kv_share", "stages")}
                rows.append(row | known[key])
            print(f"\n{table(rows)}\n", flush=True)
    if options.out:
        report = measured_on() | {
            "searched": options.searched,
            "samples_per_task": options.samples,
            "checked_per_task": options.check,
            "layers": LAYERS,
            "searches": {name: {"options": SEARCHES[name], "seconds": seconds[name]} for name in SEARCHES},
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows) + "\n")
        plot_schedules(rows, options.out.with_suffix(".png"))
    worst = max(found.get("largest_gap", 0.0) for found in known.values())
    if worst > TIE:
        sys.exit(f"the engine parts from the reference by {worst} logits")


if __name__ == "__main__":
    main()
