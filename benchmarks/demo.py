# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares stock vLLM with `--model-impl vtw` at two values of K, on the small trained LLaVA.

The model is that of `benchmarks/quality`. All servers get the same KV memory, and the same questions about
drawn images through the OpenAI client.
"""

import base64
import io
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Event

from openai import OpenAI
from PIL import Image

from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS, Question, samples
from benchmarks.server import Server, ServerError, serving

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
WITHDRAWN_AFTER = (9, 6)
"""The values of K, of the model's 12 layers. At 9, few answers are lost; 6 is half of the layers."""
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
            with watching(server) as running:
                said = list(answers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # After Ctrl-C, nobody waits for answers.
    lines = {}
    for task in TASKS:
        right = [a == q.answer for (_, q), a in zip(asked, said, strict=True) if q.task == task]
        lines[f"right answers, {task}"] = f"{sum(right)} of {len(right)}"
    lines["most requests running at once"] = f"{max(running):.0f}"
    return Column(name, said, lines)


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Records how many requests a server runs, ten times a second, until the `with` block ends.

    Yields:
        A list to which the numbers are added, which starts with 0.
    """
    seen, done = [0.0], Event()

    def watch() -> None:
        while not done.wait(0.1):
            seen.append(server.metrics()["vllm:num_requests_running"])

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            yield seen
        finally:
            done.set()
        watcher.result()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked = [sample for task in TASKS for sample in islice(samples("test", task), SAMPLES)]
    columns = [measure("stock", asked)]
    for layer in WITHDRAWN_AFTER:
        vtw = json.dumps({"vtw": {"layer": layer}})
        columns.append(measure(f"vtw, K = {layer}", asked, "--model-impl=vtw", f"--additional-config={vtw}"))
    for number in range(0, len(asked), SAMPLES):
        question = asked[number][1]
        print(f"\n{question.text}")
        for name, said in [("right", question.answer), *((each.name, each.said[number]) for each in columns)]:
            print(f"  {name:<12}{said}")
    print(f"\n{'':<30}" + "".join(f"{column.name:>20}" for column in columns))
    for line in columns[0].lines:
        print(f"{line:<30}" + "".join(f"{column.lines[line]:>20}" for column in columns))
    print(f"\nOf {LAYERS} layers, in {KV_MIB} MiB of KV memory. {SAMPLES} questions a task are few:")
    print("`make quality` asks more, and `make bench` measures speed, on a larger model.")
    print("`vtw calibrate MODEL --data FILE` finds the K for a model on your own data.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has stopped the server.
    except ServerError as failure:
        sys.exit(str(failure))
