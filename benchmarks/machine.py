# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Describes the machine and the versions that a result was measured with."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def measured_on() -> dict[str, Any]:
    """What every result records: the time, the machine, package versions, and this project's revision.

    The revision comes from git or, if that fails, from the environment variable `REVISION`.
    """
    gpus = printed_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "gpus": gpus.splitlines()},
        "versions": {name: version(name) for name in ("vllm-vtw", "vllm", "torch", "transformers")},
        "revision": printed_by("git", "describe", "--always", "--dirty") or os.environ.get("REVISION", ""),
    }


def processor() -> str:
    """The name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor()


def printed_by(*command: str) -> str:
    """The output of a command. Empty if the command is missing or fails."""
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
