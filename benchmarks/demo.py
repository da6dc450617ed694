# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares stock vLLM with `--model-impl vtw`, at one K for all requests and with gates that decide for each.

The model is the small trained LLaVA of `benchmarks/quality`. `vtw dyvte train` trains the gates. All servers
get the same KV memory, and the same questions about drawn images through the OpenAI client.
"""

import base64
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from openai import OpenAI
from PIL import Image
from transformers import LlavaConfig

from benchmarks.quality.data import write_data
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS, Question, samples
from benchmarks.server import Server, ServerError, serving
from vllm_vtw.commands.plan import plan

KV_MIB = 8
OPTIONS = (
    f"--kv-cache-memory-bytes={KV_MIB << 20}",
    "--block-size=32",
    "--max-model-len=256",
    "--dtype=float32",
    "--enforce-eager",
    "--no-enable-prefix-caching",
    '--limit-mm-per-prompt={"image": 1}',
)
WITHDRAWN_AFTER = 6
"""K, which is half of the model's layers, as published."""
GATED = (4, 6, 8, 10)
"""The layers with gates."""
THRESHOLD = 2.0
"""The threshold of the gates. The published one, 0, withdraws visual tokens more readily."""
TRAINING_SAMPLES = 600
SAMPLES = 32
"""The number of questions of each task."""
CLIENTS = 48


@dataclass
class Column:
    """The results of one server.

    Attributes:
        name: The heading of the server's column in the table.
        said: The server's answer to each sample.
        lines: The content of the server's column, by the name of the table's line.
    """

    name: str
    said: list[str]
    lines: dict[str, str]


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(client: OpenAI, model: str, picture: Image.Image, question: Question) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": question.text},
    ]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_completion_tokens=MAX_ANSWER_TOKENS,
        temperature=0,
    )
    return (answer.choices[0].message.content or "").strip()


def measure(name: str, asked: list[tuple[Image.Image, Question]], *options: str) -> Column:
    """Starts a server, asks it all questions, and returns its column of the table.

    Args:
        name: The heading of the column.
        asked: The images and questions.
        options: Options of `vllm serve` in addition to `OPTIONS`.
    """
    print(f"\n$ {shlex.join(('vllm', 'serve', CHECKPOINT.name, *OPTIONS, *options))}", flush=True)
    started = time.monotonic()
    with serving(CHECKPOINT, *OPTIONS, *options) as server:
        print(f"  up after {time.monotonic() - started:.0f} s", flush=True)
        for line in server.log().splitlines():
            if "vtw:" in line:
                print("  " + re.sub(r"^.*?\] ", "", line), flush=True)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        served = client.models.list().data[0].id
        pool = ThreadPoolExecutor(CLIENTS)
        try:
            answers = pool.map(lambda sample: ask(client, served, *sample), asked)
            with watching(server) as seen:
                said = list(answers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # After Ctrl-C, nobody waits for answers.
    lines = {}
    for task in TASKS:
        right = [a == q.answer for (_, q), a in zip(asked, said, strict=True) if q.task == task]
        lines[f"right answers, {task}"] = f"{sum(right)} of {len(right)}"
    lines["most requests running at once"] = f"{max(at['vllm:num_requests_running'] for at in seen):.0f}"
    lines["KV memory of these requests"] = "100%"
    if options:
        # The first metrics may be from before any request.
        reported = [at for at in seen if "vllm:vtw_kv_blocks" in at]
        held = sum(at["vllm:vtw_kv_blocks"] for at in reported)
        saved = sum(at["vllm:vtw_kv_blocks_saved"] for at in reported)
        if not held:
            sys.exit("the server's metrics have no vllm:vtw_kv_blocks: it does not withdraw visual tokens")
        lines["KV memory of these requests"] = f"{held / (held + saved):.0%}"
    return Column(name, said, lines)


@contextmanager
def watching(server: Server) -> Iterator[list[dict[str, float]]]:
    """Reads a server's metrics ten times a second, until the `with` block ends.

    Yields:
        A list to which the metrics are added.
    """
    seen, done = [server.metrics()], Event()

    def watch() -> None:
        while not done.wait(0.1):
            seen.append(server.metrics())

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            yield seen
        finally:
            done.set()
        watcher.result()


def trained_gates(folder: Path) -> Path:
    """Trains gates with `vtw dyvte train`. Returns the policy file.

    Args:
        folder: The folder for the data and the results.
    """
    data, out = write_data(folder, list(TASKS), TRAINING_SAMPLES), folder / "vtw-dyvte"
    command = ["dyvte", "train", str(CHECKPOINT), f"--data={data}", f"--limit={TRAINING_SAMPLES}"]
    command += [f"--max-tokens={MAX_ANSWER_TOKENS}", f"--layers={','.join(map(str, GATED))}", f"--out={out}"]
    shown = [Path(word).name if Path(word).is_absolute() else word for word in command]
    print(f"\n$ {shlex.join(('vtw', *shown))}", flush=True)
    started = time.monotonic()
    vtw = str(Path(sys.executable).with_name("vtw"))
    done = subprocess.run([vtw, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vtw dyvte train ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    seconds = time.monotonic() - started
    print(f"  trained gates for {len(GATED)} layers in {seconds:.0f} s", flush=True)
    print(
        f"  raised their thresholds from 0 to {THRESHOLD:g}, with which visual tokens stay longer", flush=True
    )
    file = out / "policy.json"
    policy = json.loads(file.read_text())
    policy["gate"]["thresholds"] = [THRESHOLD] * len(GATED)
    file.write_text(json.dumps(policy))
    return file


def larger_model() -> Iterator[str]:
    """What `vtw plan` says about LLaVA-1.5-7B, whose configuration is the default of transformers."""
    hf_config = LlavaConfig()
    layers = hf_config.text_config.num_hidden_layers
    for layer in (layers // 2, 3 * layers // 4, 7 * layers // 8):
        planned = plan(
            hf_config,
            {"layer": layer},
            prefix_caching=True,
            block_size=16,
            bytes_per_value=2,
            kv_memory=8 << 30,
            text_tokens=64,
            images=1,
            visual_tokens=576,
            output_tokens=128,
        )
        stock, vtw = planned["max_sequences"]["stock"], planned["max_sequences"]["vtw"]
        yield f"  K = {layer} of {layers}: {vtw} requests in 8 GiB, stock vLLM {stock}, x {vtw / stock:.2f}"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked = [sample for task in TASKS for sample in islice(samples("test", task), SAMPLES)]
    with TemporaryDirectory() as folder:
        gates = trained_gates(Path(folder))
        columns = [measure("stock", asked)]
        served: dict[str, dict[str, Any]] = {
            f"vtw, K = {WITHDRAWN_AFTER}": {"layer": WITHDRAWN_AFTER},
            "vtw, gates": {"policy": str(gates)},
        }
        for name, options in served.items():
            vtw = json.dumps({"vtw": options})
            columns.append(measure(name, asked, "--model-impl=vtw", f"--additional-config={vtw}"))
    for number in range(0, len(asked), SAMPLES):
        question = asked[number][1]
        print(f"\n{question.text}")
        for name, said in [("right", question.answer), *((each.name, each.said[number]) for each in columns)]:
            print(f"  {name:<12}{said}")
    print(f"\n{'':<30}" + "".join(f"{column.name:>20}" for column in columns))
    for line in columns[0].lines:
        print(f"{line:<30}" + "".join(f"{column.lines[line]:>20}" for column in columns))
    print(f"\nOf {LAYERS} layers, in {KV_MIB} MiB of KV memory, with images of 64 tokens.")
    print(f"{SAMPLES} questions a task are few: `make quality` asks more, and `make bench` measures speed.")
    print("\nLLaVA-1.5-7B, an image of 576 tokens with 64 text and 128 output tokens, says `vtw plan`:")
    print("\n".join(larger_model()))
    print("`vtw calibrate MODEL --data FILE` finds the K for a model on your own data.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has stopped the server.
    except ServerError as failure:
        sys.exit(str(failure))
