# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Creates or refreshes `.venv-next`: the packages of `.venv`, but the Python sources of another vLLM.

.venv/bin/python -m tools.setup_next [VERSION]

Without a version, it is the newest one that the plugin was tested with. `make test-next` runs tests there.
It is for releases without a build for the CPU, and a canary for those to come. The compiled code stays that
of `.venv`, which is for the CPU: releases change little of what their Python sources call.

It does nothing if `.venv-next` was made from the same version, `.venv` and tool.
"""

import hashlib
import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from tools.setup_env import ROOT, site_packages
from tools.setup_env import STAMP as MADE_FROM
from vllm_vtw.versions import TESTED

VENV = ROOT / ".venv-next"
STAMP = VENV / "made-from"
OF_VLLM = re.compile(r"vllm([-_]cpu)?(-.*)?|__pycache__")
"""The names of what belongs to the vLLM of `.venv`, which is left out."""
SOURCES = {".jinja", ".json", ".py"}
"""The files of the other vLLM that are kept. What is compiled is for CUDA."""
NEEDED = ("orjson==3.11.9",)
"""What vLLM imports since 0.33 and `.venv` lacks."""


def fingerprint(version: str) -> str:
    """A hash of everything that `.venv-next` is made from. It is made again if it changes."""
    digest = hashlib.sha256(f"{version} {MADE_FROM.read_text()}".encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def pip(command: str, *args: str) -> None:
    """Runs a command of the pip of `.venv`, without dependencies and without building anything."""
    options = ["-qq", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([sys.executable, "-m", "pip", command, *options, *args], check=False).returncode:
        sys.exit(f"pip {command} failed: {' '.join(args)}")


def link_packages(target: Path) -> None:
    """Links everything that is installed in `.venv`, but for vLLM, into a folder."""
    for entry in site_packages().iterdir():
        if not OF_VLLM.fullmatch(entry.name):
            (target / entry.name).symlink_to(entry)


def unpack_sources(version: str, target: Path) -> None:
    """Puts the Python sources of a vLLM into a folder, with metadata for which it chooses the CPU."""
    with TemporaryDirectory() as folder:
        pip("download", "--dest", folder, f"vllm=={version}")
        (wheel,) = Path(folder).iterdir()
        with ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).suffix in SOURCES]
            archive.extractall(target, names)
    for kernels in (site_packages() / "vllm").glob("*.so"):
        (target / "vllm" / kernels.name).symlink_to(kernels)
    metadata = target / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def main() -> None:
    version = sys.argv[1] if len(sys.argv) > 1 else TESTED[-1].version
    made_from = fingerprint(version)
    if STAMP.exists() and STAMP.read_text() == made_from:
        return
    print(f"Setting up {VENV.name} with the Python sources of vLLM {version}", flush=True)
    venv.create(VENV, clear=VENV.exists(), symlinks=True)
    target = VENV / site_packages().relative_to(MADE_FROM.parent)
    link_packages(target)
    unpack_sources(version, target)
    pip("install", "--target", str(target), *NEEDED)
    STAMP.write_text(made_from)


if __name__ == "__main__":
    main()
