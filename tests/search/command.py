# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs the commands that search, in this process."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.quality.model import CHECKPOINT
from vllm_vtw.commands.cli import main

SAMPLES = 48
"""Of the trained model's questions, in the data of these tests."""
FEW = ("--limit=8", "--max-tokens=8")
LOOK = ("--limit=12", "--max-tokens=8")
"""How many samples DyVTE's gates see."""
TRAIN = (*LOOK, "--layers=4,9", "--epochs=3", "--learning-rate=0.001")
"""How they are trained."""


class Ended(NamedTuple):
    """A command's end."""

    status: int
    out: str
    err: str


def calibrate(data: Path, out: Path, *options: str, model: Path = CHECKPOINT) -> Ended:
    return vtw("calibrate", str(model), "--data", str(data), "--out", str(out), *options)


def searched(method: str, data: Path, out: Path, *options: str) -> Ended:
    """`vtw gsearch` or `vtw psigmoid` on few samples."""
    return vtw(method, str(CHECKPOINT), f"--data={data}", f"--out={out}", *FEW, *options)


def dyvte(command: str, data: Path, out: Path, *options: str) -> Ended:
    return vtw("dyvte", command, str(CHECKPOINT), f"--data={data}", f"--out={out}", *options)


def vtw(*command: str) -> Ended:
    """Of `vtw` with these arguments."""
    stdout, stderr = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(stdout), redirect_stderr(stderr), patch.object(sys, "argv", ["vtw", *command]):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def found(out: Path) -> dict[str, Any]:
    """A result without what is of its run alone."""
    result = json.loads((out / "result.json").read_text())
    del result["made"]["when"]
    return result
