# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vllm serve --model-impl vtw`, as its users meet it."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import Server, ServerError, alive, serving
from tests.engine.adapters import Adapter
from tests.engine.engines import BLOCK_SIZE, MODEL, A, Ask, B, assert_follows
from tools.dashboard import queries

LAYER = MODEL.layers // 2
PROBED = "vllm:vtw_kv_blocks_saved"
"""What the documentation has a probe look for."""
OPTIONS = (
    "--dtype=float32",
    "--max-model-len=512",
    f"--block-size={BLOCK_SIZE}",
    f"--kv-cache-memory-bytes={16 << 20}",
    "--enforce-eager",
    "--no-enable-prefix-caching",
    '--limit-mm-per-prompt={"image": 2}',
    "--model-impl=vtw",
)


@pytest.fixture(scope="module")
def adapter(checkpoint, reference) -> Adapter:
    return Adapter(reference(checkpoint(MODEL)), seed=1)


@pytest.fixture(scope="module")
def server(checkpoint, adapter, tmp_path_factory):
    vtw = json.dumps({"vtw": {"layer": LAYER}})
    folder = adapter.save(tmp_path_factory.mktemp("adapters") / "first")
    lora = ("--enable-lora", f"--lora-modules=first={folder}")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
    with serving(checkpoint(MODEL), *OPTIONS, *lora, *tools, f"--additional-config={vtw}") as server:
        assert server.by_engine(PROBED) == {"0": 0}, "there is a value before any request"
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def message(*images) -> list:
    parts = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def chat(client: OpenAI, *images, extra_body=None, **options):
    request: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "max_completion_tokens": 32,
    } | options
    return client.chat.completions.create(
        messages=message(*images),
        temperature=0,
        **request,
        extra_body={"ignore_eos": True, "return_token_ids": True} | (extra_body or {}),
    )


@pytest.mark.parametrize("images", [(), (A,), (A, B)], ids=["text", "one", "two"])
def test_chat_is_the_reference(client, checkpoint, reference, images):
    answer = chat(client, *images)
    ask = Ask("chat", "", images)
    prompt_ids, output_ids = answer.prompt_token_ids, answer.choices[0].token_ids
    assert len(output_ids) == 32
    assert_follows(reference(checkpoint(MODEL)), ask, prompt_ids, output_ids, LAYER, align_to=1)


def test_an_adapter_answers_as_its_own_reference(client, server, checkpoint, adapter):
    answer = chat(client, A, B, model="first")
    ask = Ask("chat", "", (A, B))
    prompt_ids, output_ids = answer.prompt_token_ids, answer.choices[0].token_ids
    assert_follows(adapter.merged(checkpoint(MODEL)), ask, prompt_ids, output_ids, LAYER, align_to=1)
    deadline = time.monotonic() + 20
    while "first" not in (shown := adapters_shown(server)) and time.monotonic() < deadline:
        chat(client, A, model="first")
    assert shown == {"", "first"}


def adapters_shown(server: Server) -> set[str]:
    """What vLLM's metric of adapters has named. It shares a field with the plugin's metrics."""
    named = [sample.labels for sample in samples(server) if sample.name == "vllm:lora_requests_info"]
    return {labels[f"{status}_lora_adapters"] for labels in named for status in ("waiting", "running")}


def test_streaming_gives_the_same_answer(client):
    whole = chat(client, A).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, A, stream=True) if chunk.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_structured_output(client):
    choices = ["a circle", "a square"]
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=message(A),
        max_completion_tokens=32,
        extra_body={"structured_outputs": {"choice": choices}},
    )
    assert answer.choices[0].message.content in choices


def test_a_tool_call(client):
    """vLLM's grammar makes even a random model name the tool and write its arguments as JSON."""
    tool = {"type": "function", "function": {"name": "draw", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "draw"}}
    options = {"tools": [tool], "tool_choice": named, "max_completion_tokens": 200}
    answer = chat(client, A, extra_body={"ignore_eos": False}, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "draw"
    json.loads(call.function.arguments)


def test_bad_requests_get_400_and_the_server_lives_on(client):
    with pytest.raises(BadRequestError, match="At most 2 image"):
        chat(client, A, B, A)
    with pytest.raises(BadRequestError, match="cannot be greater than max_model_len"):
        chat(client, A, max_completion_tokens=5000)
    assert chat(client, A).choices[0].token_ids


def test_a_client_that_hangs_up_leaves_nothing_behind(client, server):
    stream = chat(client, A, stream=True, max_completion_tokens=380)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        metrics = server.metrics()
        if metrics["vllm:num_requests_running"] == 0 and metrics["vllm:kv_cache_usage_perc"] == 0:
            break
        time.sleep(0.1)
    assert metrics["vllm:num_requests_running"] == 0
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    assert chat(client, A).choices[0].token_ids


def samples(server: Server) -> list:
    families = text_string_to_metric_families(server.metrics_page())
    everything = [sample for family in families for sample in family.samples]
    return [sample for sample in everything if not sample.name.endswith("_created")]


def withdrawal(server: Server) -> dict[tuple[str, str], float]:
    """The plugin's metrics, by name and by what tells their numbers apart."""
    return {
        (sample.name, sample.labels.get("layer") or sample.labels.get("stage", "")): sample.value
        for sample in samples(server)
        if sample.name.startswith("vllm:vtw_")
    }


def deep_blocks(server: Server, held: bool, seconds: float) -> dict[tuple[str, str], float] | None:
    """The metrics once they say that deep layers hold blocks, or that they hold none. None if they never do.

    vLLM updates its metrics once a second.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = withdrawal(server)
        if (now["vllm:vtw_kv_blocks", "1"] > 0) == held:
            return now
        time.sleep(0.1)
    return None


def test_metrics(client, server):
    chat(client, A)
    before = deep_blocks(server, held=False, seconds=20)
    assert before is not None
    chat(client)
    chat(client, A, B)
    assert deep_blocks(server, held=False, seconds=20)
    streams, now = 0, None
    while now is None:
        # An answer may end before the metrics are updated.
        assert streams < 20
        stream = chat(client, A, stream=True, max_completion_tokens=380)
        streams += 1
        next(iter(stream))
        now = deep_blocks(server, held=True, seconds=2)
        list(stream)
    grown = {key: value - before.get(key, 0) for key, value in now.items()}
    assert grown["vllm:vtw_requests_total", str(MODEL.layers)] == 1
    assert grown["vllm:vtw_requests_total", str(LAYER)] == 1 + streams
    assert grown["vllm:vtw_withdrawn_tokens_total", "1"] == 200 + 100 * streams
    all_tokens, text_only = now["vllm:vtw_kv_blocks", "0"], now["vllm:vtw_kv_blocks", "1"]
    assert all_tokens - text_only in (100 // BLOCK_SIZE, 100 // BLOCK_SIZE + 1)
    # A block of stock's holds twice the layers.
    assert now["vllm:vtw_kv_blocks_saved", ""] == all_tokens - text_only
    assert deep_blocks(server, held=False, seconds=20)


def test_the_dashboard_shows_metrics_that_there_are(client, server):
    chat(client, A)
    shown = set(re.findall(r"vllm:\w+", " ".join(queries())))
    there = {sample.name for sample in samples(server)}
    elsewhere = ("vllm:vtw_exit_layer", "vllm:vtw_guard_")
    assert {name for name in shown if not name.startswith(elsewhere)} <= there, "but of gates and guards"
    assert {name for name in there if name.startswith("vllm:vtw_")} <= shown


HOLD = """
import signal, sys, time
from pathlib import Path
from benchmarks.server import serving
# As in a terminal: a job in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
with serving(Path(sys.argv[1]), *sys.argv[2:]) as server:
    print("UP", server.process.pid, flush=True)
    time.sleep(300)
"""


def test_ctrl_c_leaves_no_process(checkpoint):
    vtw = json.dumps({"vtw": {"layer": LAYER}})
    options = (*OPTIONS, f"--additional-config={vtw}")
    command = [sys.executable, "-c", HOLD, str(checkpoint(MODEL)), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        group = int(holder.stdout.readline().removeprefix("UP "))
        assert alive(group)
        holder.send_signal(signal.SIGINT)
        assert holder.wait(60) != 0
    assert not alive(group)


def test_the_start_up_line(server):
    (line,) = [line for line in server.log().splitlines() if "vtw: withdrawing" in line]
    assert f"every visual token at layer K = {LAYER} of L = {MODEL.layers}" in line
    assert f"KV cache groups: {LAYER} layers (all) + {LAYER} layers (text)" in line
    # 100 tokens, 2 heads of 32 floats for keys and as many for values: 51,200 bytes a layer.
    assert "an image of 100 tokens takes about 0.20 MiB of KV cache, 0.39 MiB in stock vLLM" in line


@pytest.mark.slow
def test_data_parallel_ranks_take_turns(checkpoint, reference):
    """One request at a time leaves a rank idle; several together keep both busy."""
    vtw = json.dumps({"vtw": {"layer": LAYER}})
    options = (*OPTIONS, "--data-parallel-size=2", f"--additional-config={vtw}")
    images = [(A,), (B,), (), (A, B)]
    with serving(checkpoint(MODEL), *options, env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) as server:
        assert server.by_engine(PROBED) == {"0": 0, "1": 0}
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        alone = [chat(client, *each) for each in images]
        with ThreadPoolExecutor() as pool:
            together = list(pool.map(lambda each: chat(client, *each), images))
        engines = server.by_engine("vllm:request_success_total")
    assert len(engines) == 2
    assert all(count > 0 for count in engines.values())
    assert sum(engines.values()) == 2 * len(images)
    for each, one, other in zip(images, alone, together, strict=True):
        token_ids = one.choices[0].token_ids
        assert token_ids == other.choices[0].token_ids
        assert_follows(
            reference(checkpoint(MODEL)), Ask("chat", "", each), one.prompt_token_ids, token_ids, LAYER, 1
        )


def test_a_wrong_option_ends_the_start_with_the_reason(checkpoint):
    message = r'\["vtw"\]\["layr"\] = 4: unknown key; allowed are layer, layers, policy, align, guard'
    options = (*OPTIONS, '--additional-config={"vtw": {"layr": 4}}')
    with pytest.raises(ServerError, match=message), serving(checkpoint(MODEL), *options):
        pytest.fail("the server came up")
