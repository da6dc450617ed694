# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Writes questions to the trained model, with their images, as a data file for the commands that search.

python -m benchmarks.quality.data --out questions [--samples 384] [--tasks counting ocr]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.evaluate import positive
from benchmarks.quality.tasks import TASKS, samples


def write_data(folder: Path, tasks: Sequence[str], number: int) -> Path:
    """Writes samples of the validation split for a command's `--data`.

    Args:
        folder: The folder to write to.
        tasks: The tasks, which take turns.
        number: The number of samples.

    Returns:
        The data file.
    """
    lines = []
    streams = {task: samples("validation", task) for task in tasks}
    for index in range(number):
        picture, question = next(streams[tasks[index % len(tasks)]])
        picture.save(folder / f"{index}.png")
        line = {"image": f"{index}.png", "prompt": question.text}
        lines.append(json.dumps(line | {"task": question.task, "answer": question.answer}) + "\n")
    file = folder / "data.jsonl"
    file.write_text("".join(lines))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for data.jsonl and its images")
    parser.add_argument("--samples", type=positive, default=384, help="how many questions")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks, which take turns"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(write_data(options.out, options.tasks, options.samples))


if __name__ == "__main__":
    main()
