"""The corners of the V1 tests once more on model runner V2, in a process where its Triton kernels can run."""

import os
import subprocess
import sys

CORNERS = (
    "tests/engine/test_parity.py::test_every_request_shape[K1of8-tokens-2heads-llama-64]",
    "tests/engine/test_parity.py::test_every_request_shape[K4of8-blocks-1heads-qwen2-8192]",
    "tests/engine/test_blocks.py::test_preempted_requests_resume_with_the_same_answers[False]",
    "tests/engine/test_blocks.py::test_several_stages",
)


def test_corners():
    """`running` fails where an engine's runner is not the one that the environment asks for."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.engine.triton_interpreter",
        "-q",
        "-m",
        "",
        *CORNERS,
    ]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"{len(CORNERS)} passed" in result.stdout
