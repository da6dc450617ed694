# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The wheel as a user installs it, from an empty environment to an answer."""

import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from openai import OpenAI

from benchmarks.demo import OPTIONS, ask
from benchmarks.quality.model import CHECKPOINT
from benchmarks.quality.tasks import samples
from benchmarks.server import serving
from tests.deploy.conftest import Environment
from tools import setup_env

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fresh(wheel) -> Iterator[Environment]:
    """An environment with vLLM's CPU backend, as `make` sets it up, and the wheel instead of the checkout."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name) / "environment"
        patch.setattr(setup_env, "VENV", folder)
        patch.setattr(setup_env, "PYTHON", folder / "bin" / "python")
        patch.setattr(setup_env, "STAMP", folder / "made-from")
        setup_env.main()
        assert setup_env.pip("--force-reinstall", str(wheel))
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        yield Environment(folder, os.environ | {"PATH": path})


def test_a_fresh_environment_serves(fresh, monkeypatch):
    where = fresh.run("python -c 'import vllm_vtw; print(vllm_vtw.__file__)'")
    assert Path(where.strip()).is_relative_to(fresh.folder)
    assert "This environment can serve: vllm serve MODEL --model-impl vtw" in fresh.run("vtw doctor")
    # `serving` runs vLLM in this Python, and would find the checkout in the working directory.
    monkeypatch.setattr(sys, "executable", str(fresh.folder / "bin" / "python"))
    monkeypatch.chdir(fresh.folder)
    options = f"--additional-config={json.dumps({'vtw': {'layer': 6}})}"
    with serving(CHECKPOINT, *OPTIONS, "--model-impl=vtw", options) as server:
        assert "vtw: withdrawing every visual token at layer K = 6" in server.log()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        model = client.models.list().data[0].id
        (asked,) = islice(samples("test", "presence"), 1)
        assert ask(client, model, *asked) == asked[1].answer
