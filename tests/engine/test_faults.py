# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A process killed in the middle of requests: the server ends as stock vLLM's does."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI, OpenAIError

from benchmarks.server import alive, serving
from tests.engine.engines import MODEL, A, B
from tests.engine.test_server import LAYER, OPTIONS, chat

VTW = (*OPTIONS, f"--additional-config={json.dumps({'vtw': {'layer': LAYER}})}")
STOCK = tuple(option for option in OPTIONS if not option.startswith("--model-impl"))


def ends(model: Path, options: Sequence[str], victim: str, env: dict[str, str]) -> dict[str, Any]:
    """What a client and the server's parent see of it."""
    with serving(model, *options, env=env) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        streams = [
            chat(client, *images, stream=True, max_completion_tokens=300) for images in ((A,), (A, B), ())
        ]
        for stream in streams:
            next(iter(stream))
        (process, *_) = [
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if victim in " ".join([child.name(), *child.cmdline()])
        ]
        os.kill(process.pid, signal.SIGKILL)
        seen: list[Any] = []
        for stream in streams:
            try:
                seen.append([chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1:])
            except OpenAIError as error:
                seen.append(type(error).__name__)
        status = server.process.wait(60)
    return {"streams": seen, "status": status, "left": alive(server.process.pid)}


@pytest.mark.parametrize(
    ("victim", "more", "env"),
    [
        ("EngineCore", (), {}),
        ("Worker", ("--tensor-parallel-size=2",), {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
    ],
)
@pytest.mark.slow
def test_a_killed_process_ends_the_server_as_in_stock(checkpoint, victim, more, env):
    model = checkpoint(MODEL)
    ours, stock = (ends(model, (*options, *more), victim, env) for options in (VTW, STOCK))
    assert ours == stock
    assert not ours["left"]
