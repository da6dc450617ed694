"""Corners of the V1 tests once more on model runner V2, in a process where its Triton kernels can run."""

import os
import subprocess
import sys

import pytest

PARITY = "test_parity.py::test_every_request_shape"
PREEMPTED = "test_blocks.py::test_preempted_requests_resume_with_the_same_answers"


@pytest.mark.parametrize(
    "corner",
    [
        "test_blocks.py::test_several_stages",
        pytest.param(f"{PARITY}[K1of8-tokens-2heads-llama-64]", marks=pytest.mark.slow),
        pytest.param(f"{PARITY}[K4of8-blocks-1heads-qwen2-8192]", marks=pytest.mark.slow),
        pytest.param(f"{PREEMPTED}[False]", marks=pytest.mark.slow),
    ],
)
def test_corner(corner):
    """`running` fails where an engine's runner is not the one that the environment asks for."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.engine.triton_interpreter", "-q", "-m", ""]
    result = subprocess.run(
        [*command, f"tests/engine/{corner}"], env=os.environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert "1 passed" in result.stdout
