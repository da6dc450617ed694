# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`deploy/Dockerfile`, as far as it can be tested without Docker."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_vtw
from tests.deploy.options import DEPLOY, ROOT, assert_withdraws_at_16, parsed

DOCKERFILE = DEPLOY / "Dockerfile"
UV = """\
#!/bin/sh
[ "$1 $2 $3" = "pip install --system" ] && shift 3 && exec python -m pip install --no-build-isolation "$@"
"""
"""What stands in for uv, which vLLM's image has."""


def instructions() -> list[tuple[str, str]]:
    """The name and the arguments of each instruction."""
    lines = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text()).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name.isalpha()]


def test_the_linter_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_base_has_the_vllm_that_pip_would_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = project["optional-dependencies"]["cuda"]
    (base,) = [rest for name, rest in instructions() if name == "FROM"]
    assert base == vllm.replace("vllm==", "vllm/vllm-openai:v")


@pytest.mark.parametrize("extras", ["", "[calibrate]"])
def test_what_the_build_copies_can_be_installed(environment, tmp_path, extras):
    """It takes the steps of the build, on the packages that are installed here."""
    uv = environment.folder / "bin" / "uv"
    uv.write_text(UV)
    uv.chmod(0o755)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    image, said = tmp_path / "image", ""
    for name, rest in instructions():
        if name == "WORKDIR":
            cwd = image / rest.removeprefix("/")
            cwd.mkdir(parents=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in map(Path, sources):
                assert f"!{source}" in ignored, f"{source} does not get to the build"
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, cwd / target)
                else:
                    shutil.copy(ROOT / source, cwd / target)
        elif name == "RUN":
            said += environment.run(rest, cwd, EXTRAS=extras)
    assert f"\nvllm-vtw {vllm_vtw.__version__}" in said
    assert "does not provide the extra" not in said
    where = environment.run("python -c 'import vllm_vtw; print(vllm_vtw.__file__)'")
    assert Path(where.strip()).is_relative_to(environment.folder)


@pytest.mark.parametrize("options", [["--served-model-name", "llava"], ["--port=80"]])
def test_the_image_serves_the_model_that_it_is_given(tmp_path, options):
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\nfor argument in "$@"; do echo "$argument"; done\n')
    vllm.chmod(0o755)
    (entrypoint,) = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    given = ["llava-hf/llava-1.5-7b-hf", *options, "--additional-config", '{"vtw": {"layer": 16}}']
    command = f"PATH={shlex.quote(str(tmp_path))}:$PATH exec {shlex.join([*entrypoint, *given])}"
    arguments = subprocess.check_output(["sh", "-c", command], text=True).splitlines()
    args = parsed(*arguments)
    assert args.model_tag == given[0]
    assert_withdraws_at_16(args.model_impl, args.additional_config)
