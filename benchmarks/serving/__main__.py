# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares the speed of stock vLLM and the plugin at equal KV memory.

    python -m benchmarks.serving [SETUP] [--only TEXT] [--output FILE [--resume]]

The setups `small`, `small-qwen`, `schedule` and `rankings` need two cores of a CPU, and the others need one
GPU. Nothing else should run at the same time.
"""

import argparse
import json
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.compare import read
from benchmarks.serving.run import measure
from benchmarks.serving.setups import ON_CPU, ON_GPU, SETUPS
from benchmarks.serving.show import write_plots, write_tables

FOLDER = Path(".cache/serving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("setup", nargs="?", choices=SETUPS, default="small")
    parser.add_argument("--only", default="", help="the points alone with this in their name, as in 'K:'")
    parser.add_argument("--output", type=Path, help="JSON file, written over; tables and plots go beside it")
    parser.add_argument("--resume", action="store_true", help="go on where the output file ends")
    arguments = parser.parse_args()
    if arguments.setup in ON_GPU and not torch.cuda.is_available():
        parser.error(
            f"{arguments.setup} takes a GPU, and there is none: {', '.join(ON_CPU)} take two cores of a CPU"
        )
    name = "-".join([arguments.setup, *re.findall(r"\w+", arguments.only)])
    output = arguments.output or FOLDER / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.serving", arguments.setup]
    command += ["--only", arguments.only] if arguments.only else []

    def save(result: dict[str, Any]) -> None:
        whole = output.with_suffix(".part")
        whole.write_text(json.dumps({**result, "command": shlex.join(command)}, indent=1) + "\n")
        whole.replace(output)  # The file is whole even if the benchmark is interrupted.

    try:
        setup = SETUPS[arguments.setup]().chosen(arguments.only)
        earlier = read(output) if arguments.resume else None
        for shown in (output.with_suffix(".md"), output.with_suffix(".png")):
            shown.unlink(missing_ok=True)  # They show an earlier result.
        result = measure(arguments.setup, setup, FOLDER, save, earlier)
    except ValueError as wrong:
        parser.error(str(wrong))
    if not result["runs"]:
        sys.exit("no server started")
    written = write_tables(output)
    print(written.read_text())
    print(f"{output}, {written}, {write_plots(output)}")
    if result["left_out"]:
        sys.exit(f"left out: {', '.join(setup.points[int(number)].label for number in result['left_out'])}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has stopped the servers.
