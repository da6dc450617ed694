# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Writes and prints what the commands that search have found."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def save_results(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    policy: dict[str, Any] | None,
    html: Callable[[dict[str, Any], str | None], str],
    table: Sequence[str],
    policy_by: str = "",
) -> None:
    """Writes `result.json`, `report.html` and, if a policy was found, `policy.json`; prints the result.

    The process exits with status 1 if no policy was found.

    Args:
        arguments: The command's options; `model`, `out` and `json` are used.
        result: The result, which `--json` prints. It has the keys `model` and `notes`.
        policy: The content of the policy file. None if no policy was found.
        html: Makes the HTML report of the result and the command that serves the policy, if there is one.
        table: The result as lines of text.
        policy_by: What to print behind the name of the policy file, such as the criterion that chose it.
    """
    file = arguments.out / "policy.json"
    command = None
    file.unlink(missing_ok=True)
    if policy is not None:
        file.write_text(_json(policy) + "\n")
        command = serve_command(arguments.model, file)
    write_report(arguments, result, html(result, command), [*table, "", *result["notes"]])
    if not arguments.json:
        if policy is not None:
            print(f"Policy file: {file}{policy_by}")
        if command:
            print(f"To serve it (`vtw plan` shows how much KV memory it takes):\n  {command}")
    if policy is None:
        sys.exit(1)


def write_report(
    arguments: argparse.Namespace, result: dict[str, Any], html: str, lines: Sequence[str]
) -> None:
    """Writes `result.json` and `report.html`, and prints the result.

    Args:
        arguments: The command's options; `out` and `json` are used.
        result: The result, which `--json` prints.
        html: The report.
        lines: The result as lines of text, which are printed without `--json`.
    """
    page = arguments.out / "report.html"
    (arguments.out / "result.json").write_text(_json(result) + "\n")
    page.write_text(html, encoding="utf-8")
    print(_json(result) if arguments.json else "\n".join([*lines, "", f"Report: {page}"]))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False)


def serve_command(model: str, policy: Path) -> str:
    """The shell command that serves a checkpoint with a policy file."""
    options = json.dumps({"vtw": {"policy": str(policy)}})
    return shlex.join(["vllm", "serve", model, "--model-impl", "vtw", "--additional-config", options])
