# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The `vtw` command."""

import argparse

from vllm_vtw import __version__
from vllm_vtw.commands import calibrate, doctor, dyvte, guard, plan, schedules
from vllm_vtw.versions import described


def main() -> None:
    """Runs the `vtw` command that the process's arguments name."""
    parser = argparse.ArgumentParser(prog="vtw", description="Visual-token withdrawal inside vLLM.")
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (plan, calibrate, schedules, dyvte, guard, doctor):
        command.add_command(commands)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        # The command's own parser names the command's options.
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.run(arguments)


def _versions() -> str:
    _, installed = doctor.installed_vllm() or ("", "none")
    return f"vllm-vtw {__version__}, tested with vLLM {described()}; installed: {installed}"
