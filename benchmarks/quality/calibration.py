# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures which K `vtw calibrate` chooses for the trained model, and what these K cost on unseen questions.

    python -m benchmarks.quality.calibration [--samples 64] [--out FILE.json]

It calibrates on the validation split twice: once only on counting, whose answers are one token as in multiple
choice, and once on all tasks. The accuracies at the chosen K are those of the engine on the test split, which
`evaluate` wrote into `benchmarks/results/quality.json`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.quality.data import write_data
from benchmarks.quality.evaluate import positive
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS

QUALITY = Path(__file__).parents[1] / "results" / "quality.json"
DATA = {"counting": ["counting"], "all tasks": list(TASKS)}


def calibrated(tasks: Sequence[str], number: int) -> dict[str, Any]:
    """Runs `vtw calibrate`. Returns the result that it prints as JSON, and the seconds that it took.

    Args:
        tasks: The tasks of the samples.
        number: The number of samples.
    """
    with TemporaryDirectory() as folder:
        data = write_data(Path(folder), tasks, number)
        options = {"data": data, "limit": number, "max-tokens": MAX_ANSWER_TOKENS, "out": f"{folder}/out"}
        command = [str(Path(sys.executable).with_name("vtw")), "calibrate", str(CHECKPOINT), "--json"]
        command += [f"--{name}={value}" for name, value in options.items()]
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        seconds = round(time.monotonic() - started, 1)
    result = json.loads(done.stdout)
    # The other keys differ between runs and machines.
    kept = ("budget", "layer", "tasks", "layers", "first_token_kl", "curves")
    return {key: result[key] for key in kept} | {"seconds": seconds}


def table(found: dict[str, dict[str, Any]], accuracy: dict[int, dict[str, float]]) -> str:
    """A Markdown table of the accuracy of each task at each chosen K, in percent.

    Args:
        found: The results of `vtw calibrate`, by the name of the data.
        accuracy: The fraction of right answers, by K and task.
    """
    head = ["calibrated on", "criterion", "K", *TASKS]
    rows = [["", "stock", "", *(f"{100 * accuracy[LAYERS][task]:.1f}" for task in TASKS)]]
    for data, result in found.items():
        for criterion, layer in sorted(result["layer"].items(), reverse=True):
            right = [f"{100 * accuracy[layer][task]:.1f}" for task in TASKS]
            rows.append([data, criterion, str(layer), *right])
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=positive, default=64, help="of each data set")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table beside it")
    options = parser.parse_args()
    quality = json.loads(QUALITY.read_text())
    accuracy = {result["layer"]: result["engine"]["right"] for result in quality["results"]}
    found = {name: calibrated(tasks, options.samples) for name, tasks in DATA.items()}
    shown = table(found, accuracy)
    print(f"\n{shown}\n")
    for name, result in found.items():
        print(f"{options.samples} samples of {name}: {result['seconds']} s")
    if options.out:
        report = measured_on() | {"weights": quality["weights"], "samples": options.samples, "results": found}
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(shown + "\n")


if __name__ == "__main__":
    main()
