"""What `vtw calibrate` chooses for the trained model, and what those K cost on questions it has not seen.

    python -m benchmarks.quality.calibration [--samples 64] [--out FILE.json]

Calibrates on the validation split, on one task alone and on all, and reads the accuracies at the chosen K, on the
test split and in the engine, from `benchmarks/results/quality.json`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.quality.model import CHECKPOINT, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS, samples

QUALITY = Path(__file__).parents[1] / "results" / "quality.json"
# One whose answers are one token, as in multiple choice, and all.
DATA = {"counting": ["counting"], "all tasks": list(TASKS)}


def write_data(folder: Path, tasks: Sequence[str], number: int) -> Path:
    """Writes `number` samples of the validation split, the tasks by turns, and returns the file that lists them."""
    lines = []
    streams = {task: samples("validation", task) for task in tasks}
    for index in range(number):
        picture, question = next(streams[tasks[index % len(tasks)]])
        picture.save(folder / f"{index}.png")
        line = {"image": f"{index}.png", "prompt": question.text, "task": question.task, "answer": question.answer}
        lines.append(json.dumps(line) + "\n")
    file = folder / "data.jsonl"
    file.write_text("".join(lines))
    return file


def calibrated(tasks: Sequence[str], number: int) -> dict[str, Any]:
    """What `vtw calibrate` finds, and the seconds that the whole command took."""
    with TemporaryDirectory() as folder:
        data = write_data(Path(folder), tasks, number)
        command = ["vtw", "calibrate", str(CHECKPOINT), "--data", str(data), "--limit", str(number), "--json"]
        command += ["--max-tokens", str(MAX_ANSWER_TOKENS), "--out", str(Path(folder) / "out")]
        started = time.monotonic()
        done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout) | {"seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    for name, tasks in DATA.items():
        r = calibrated(tasks, 64)
        print(name, r["layer"], r["seconds"])
