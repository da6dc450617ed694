# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The package as `python -m build` makes it, and an environment without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_TRACKED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "vtw-*")


def build(source: Path, out: Path, *options: str) -> None:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        out,
        *options,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_TRACKED)
    build(folder / "checkout", folder)
    build(folder / "checkout", folder / "direct", "--wheel")
    return folder


@pytest.fixture(scope="session")
def wheel(packages) -> Path:
    (file,) = packages.glob("*.whl")
    return file


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: Its folder.
        variables: The environment variables of commands that are run in it.
    """

    folder: Path
    variables: dict[str, str]

    def run(self, command: str, cwd: Path | None = None, **variables: str) -> str:
        """Runs a shell command as if the environment was activated. Returns what it printed.

        Args:
            command: The command, which has to succeed.
            cwd: The folder to run it in. The environment's own if it is left out.
            variables: Further environment variables.
        """
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=cwd or self.folder,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}"
        return done.stdout


@pytest.fixture
def environment(tmp_path) -> Environment:
    """A new environment, without this package.

    It sees the installed packages, and pip finds their versions. What makes the checkout importable is the
    `.pth` file of its editable installation, which is left out.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_path("purelib"))
    others = [file.read_text() for file in installed.glob("*.pth") if "__editable__" not in file.name]
    (packages / "installed.pth").write_text("\n".join([str(installed), *others]))
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return Environment(folder, os.environ | {"PATH": path, "PIP_NO_INDEX": "1"})
