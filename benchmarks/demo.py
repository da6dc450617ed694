"""Stock vLLM and `--model-impl vtw` side by side, on a small LLaVA made on the spot.

Both servers get the same KV memory and the same requests, through the OpenAI client, with pictures as data
URLs. The weights are random, so what the answers say means nothing.
"""

import base64
import io
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

from openai import OpenAI
from PIL import Image, ImageDraw
from transformers.utils.logging import disable_progress_bar

from benchmarks.server import Server, ServerError, serving
from benchmarks.small_llava import SmallLlava

MODEL = SmallLlava(layers=16, hidden=256, heads=4, kv_heads=4, image_side=24)
KV_MIB = 160
OPTIONS = (
    f"--kv-cache-memory-bytes={KV_MIB << 20}",
    "--block-size=32",
    "--max-model-len=1024",
    "--dtype=float32",
    "--enforce-eager",
    "--no-enable-prefix-caching",
    '--limit-mm-per-prompt={"image": 2}',
)
REQUESTS, ANSWER_TOKENS = 24, 48
SHAPES = ("ellipse", "rectangle", "triangle")
COLOURS = ("crimson", "seagreen", "royalblue", "orange")


def picture(number: int) -> str:
    """A drawing as a data URL."""
    image = Image.new("RGB", (336, 336), "white")
    draw = ImageDraw.Draw(image)
    colour, left = COLOURS[number % len(COLOURS)], 20 + 11 * number % 150
    match SHAPES[number % len(SHAPES)]:
        case "ellipse":
            draw.ellipse((left, 60, left + 150, 260), fill=colour)
        case "rectangle":
            draw.rectangle((left, 60, left + 150, 260), fill=colour)
        case _:
            draw.polygon(((left, 260), (left + 75, 60), (left + 150, 260)), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(client: OpenAI, model: str, number: int) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": picture(number)}},
        {"type": "text", "text": "What is in this picture?"},
    ]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_completion_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    text = answer.choices[0].message.content or ""
    return "".join(letter for letter in text if letter.isascii() and letter.isprintable())


def measure(name: str, model: Path, *options: str) -> dict[str, str]:
    """One server's column of the table."""
    print(f"\n$ vllm serve MODEL {' '.join((*OPTIONS, *options))}", flush=True)
    started = time.monotonic()
    with serving(model, *OPTIONS, *options) as server:
        print(f"  up after {time.monotonic() - started:.0f} s", flush=True)
        for line in server.log().splitlines():
            if "Maximum concurrency" in line or "vtw:" in line:
                print("  " + re.sub(r"^.*?\] ", "", line), flush=True)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        served = client.models.list().data[0].id
        blocks = server.num_kv_blocks()
        # One of the pool's blocks is vLLM's null block, which nobody holds.
        held = round(peak_usage(server, lambda: ask(client, served, 0)) * (blocks - 1))
        begin = time.monotonic()
        pool = ThreadPoolExecutor(REQUESTS)
        try:
            answers = list(pool.map(lambda number: ask(client, served, number), range(REQUESTS)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for answers
        took = time.monotonic() - begin
        preempted = server.metrics()["vllm:num_preemptions_total"]
        return {
            "": name,
            "answer to picture 0": repr(answers[0][:24]),
            "answer to picture 1": repr(answers[1][:24]),
            "KV blocks in the pool": f"{blocks} of {KV_MIB * 1024 / blocks:.0f} KiB",
            "KV blocks of one request": str(held),
            "KV memory of one request": f"{held * KV_MIB / blocks:.1f} MiB",
            "such requests that fit": str((blocks - 1) // held),
            "preemptions while all ran": f"{preempted:.0f}",
            "requests per second": f"{REQUESTS / took:.2f}",
        }


def peak_usage(server: Server, work: Callable[[], object]) -> float:
    """The highest share of the KV cache that was in use while `work` ran."""
    highest, done = 0.0, Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, server.metrics()["vllm:kv_cache_usage_perc"])

    watcher = Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print(f"Making a small LLaVA: {MODEL.layers} layers, {MODEL.image_side**2} visual tokens an image")
        model = MODEL.save(Path(folder))
        columns = [measure("stock", model), measure("vtw", model, "--model-impl=vtw")]
    print()
    for row in columns[0]:
        print(f"{row:<28}" + "".join(f"{column[row]:>32}" for column in columns))
    speed = float(columns[1]["requests per second"]) / float(columns[0]["requests per second"])
    print(f"\nOn this machine, in this one run: {speed:.2f} times the requests per second.")
    print(
        "The weights are random: answers mean nothing, and differ because vtw's deep layers see no picture."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has ended its server
    except ServerError as failure:
        sys.exit(str(failure))
