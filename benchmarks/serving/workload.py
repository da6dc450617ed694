# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is asked of a server: requests of one kind, and vLLM's client that sends them."""

import argparse
import asyncio
import contextlib
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("which", "colour", "has", "the", "round", "shape", "near", "that", "large", "square", "there")


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, sent all at once or as others end.

    Args:
        requests: How many.
        text: Words, each about a token, of a question; the chat template adds some.
        output: Tokens of every answer; the end token does not end it.
        images: In each request.
        concurrency: Requests under way at most.
        questions: About each image. More than one are sent as a set of images of our own, the image first
            and the questions about it apart; otherwise `random-mm` draws them, the text first.
    """

    requests: int
    text: int
    output: int
    images: int = 1
    concurrency: int | None = None
    questions: int = 1

    def options(self, pixels: int, seed: int, folder: Path) -> list[str]:
        """`vllm bench serve`'s options. No other seed has the same requests.

        Args:
            pixels: Width and height of an image.
            seed: Of the requests.
            folder: Where a set of images may be written.
        """
        options = [f"--num-prompts={self.requests}", f"--seed={seed}", "--ignore-eos"]
        if self.concurrency:
            options.append(f"--max-concurrency={self.concurrency}")
        if self.questions > 1:
            file = write_image_set(folder / f"images-{seed}", self, pixels, seed)
            return [
                *options,
                "--dataset-name=custom_image",
                f"--dataset-path={file}",
                "--custom-ensure-client-side-data",
                f"--custom-output-len={self.output}",
            ]
        return [
            *options,
            "--dataset-name=random-mm",
            f"--random-input-len={self.text}",
            f"--random-output-len={self.output}",
            "--random-range-ratio=0",
            f"--random-mm-base-items-per-request={self.images}",
            "--random-mm-num-mm-items-range-ratio=0",
            f'--random-mm-limit-mm-per-prompt={{"image": {self.images}, "video": 0}}',
            f"--random-mm-bucket-config={{({pixels}, {pixels}, 1): 1.0}}",
        ]


def write_image_set(folder: Path, workload: Workload, pixels: int, seed: int) -> Path:
    """Writes pictures and their questions, in the format of vLLM's `custom_image`; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, rng = np.random.default_rng(seed), random.Random(seed)
    lines = []
    for number in range(workload.requests):
        picture = folder / f"{number // workload.questions}.png"
        if number % workload.questions == 0:
            Image.fromarray(noise.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)).save(picture)
        text = " ".join(rng.choices(WORDS, k=workload.text))
        content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}]
        lines.append(json.dumps({"content": content}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def send(
    workload: Workload,
    *,
    url: str,
    model: Path,
    pixels: int,
    seed: int,
    slo: Mapping[str, float],
    folder: Path,
) -> tuple[list[str], dict[str, Any]]:
    """Runs `vllm bench serve` against a server; its command line and its output.

    Args:
        workload: The requests.
        url: The server's.
        model: What it serves.
        pixels: Width and height of an image.
        seed: Of the requests.
        slo: Milliseconds by metric (`ttft`, `tpot`, `e2el`) that a request has to keep to count as good.
        folder: Where images may be written.

    Raises:
        RuntimeError: A request failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async

    options = [
        "--backend=openai-chat",
        "--endpoint=/v1/chat/completions",
        f"--base-url={url}",
        f"--model={model}",
        "--temperature=0",
        "--percentile-metrics=ttft,tpot,itl,e2el",
        "--metric-percentiles=99",
        "--disable-tqdm",
        *workload.options(pixels, seed, folder),
        "--goodput",
        *(f"{metric}:{milliseconds:g}" for metric, milliseconds in slo.items()),
    ]
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    printed = io.StringIO()
    # In this process: importing vLLM anew for every run would take longer than many of them.
    with contextlib.redirect_stdout(printed):
        output = asyncio.run(main_async(parser.parse_args(options)))
    if output["completed"] != workload.requests:
        raise RuntimeError(
            f"{output['failed']} of {workload.requests} requests failed:\n{printed.getvalue()}"
        )
    plain = json.loads(json.dumps(output, default=float))  # numpy's numbers
    return ["vllm", "bench", "serve", *options], plain
