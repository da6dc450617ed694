"""What the commands that search leave in `--out`, and print."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_vtw.config import SERVED_MODEL_TYPES


def save_results(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    policy: dict[str, Any] | None,
    html: Callable[[dict[str, Any], str | None], str],
    table: Sequence[str],
    policy_by: str = "",
) -> None:
    """Writes `result.json`, `report.html` and, where there is one, `policy.json`; exits with 1 elsewhere.

    Args:
        arguments: `model`, `out` and `json` of the command.
        result: What `--json` prints, with `model` and `notes`.
        policy: The policy file's content; None where nothing was found.
        html: The report of the result, with the command that serves the policy where one does.
        table: The result in lines.
        policy_by: What to say behind the policy file's name.
    """
    file = arguments.out / "policy.json"
    command = None
    file.unlink(missing_ok=True)
    if policy is not None:
        file.write_text(_json(policy) + "\n")
        if result["model"]["model_type"] in SERVED_MODEL_TYPES:
            command = serve_command(arguments.model, file)
    write_report(arguments, result, html(result, command), [*table, "", *result["notes"]])
    if not arguments.json:
        if policy is not None:
            print(f"Policy file: {file}{policy_by}")
        if command:
            print(f"Serve it (`vtw plan` says what it takes there):\n  {command}")
    if policy is None:
        sys.exit(1)


def write_report(
    arguments: argparse.Namespace, result: dict[str, Any], html: str, lines: Sequence[str]
) -> None:
    """Writes `result.json` and `report.html`, and prints the first, or what it says in lines."""
    page = arguments.out / "report.html"
    (arguments.out / "result.json").write_text(_json(result) + "\n")
    page.write_text(html, encoding="utf-8")
    print(_json(result) if arguments.json else "\n".join([*lines, "", f"Report: {page}"]))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False)


def serve_command(model: str, policy: Path) -> str:
    """Serves a checkpoint with a policy file."""
    options = json.dumps({"vtw": {"policy": str(policy)}})
    return shlex.join(["vllm", "serve", model, "--model-impl", "vtw", "--additional-config", options])
