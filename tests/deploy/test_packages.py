# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The wheel and the source distribution that `python -m build` makes."""

import tarfile
import zipfile
from pathlib import Path

import vllm_vtw

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "benchmarks" / "quality" / "checkpoint"


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    files = content(wheel)
    info = f"vllm_vtw-{vllm_vtw.__version__}.dist-info"
    package = {name for name in files if not name.startswith(f"{info}/")}
    there = [path for path in (ROOT / "vllm_vtw").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert package == {str(path.relative_to(ROOT)) for path in there}
    assert {"vllm_vtw/py.typed", "vllm_vtw/search/reports/page.html"} <= package
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entry_points = files[f"{info}/entry_points.txt"].decode()
    for group in ("console_scripts", "vllm.general_plugins", "vllm.stat_logger_plugins"):
        assert f"[{group}]\nvtw = " in entry_points
    metadata = files[f"{info}/METADATA"].decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert (ROOT / "README.md").read_text() in metadata


def test_the_source_distribution_makes_the_same_wheel(packages, wheel):
    (direct,) = (packages / "direct").iterdir()
    assert content(wheel) == content(direct)
    (source,) = packages.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        folders = {Path(name).parts[1] for name in archive.getnames() if "/" in name}
    assert "vllm_vtw" in folders
    assert not folders & {"benchmarks", "deploy", "docs", "patches", "tests", "tools"}


def test_the_wheel_works_without_the_checkout(environment, wheel):
    environment.run(f"python -m pip install {wheel}")
    where = environment.run("python -c 'import vllm_vtw; print(vllm_vtw.__file__)'")
    assert Path(where.strip()).is_relative_to(environment.folder)
    assert environment.run("vtw --version").startswith(f"vllm-vtw {vllm_vtw.__version__}")
    assert "requests in 8 GiB" in environment.run(f"vtw plan {CHECKPOINT} --layer 6 --visual-tokens 64")
    assert "This environment can serve: vllm serve MODEL --model-impl vtw" in environment.run("vtw doctor")
