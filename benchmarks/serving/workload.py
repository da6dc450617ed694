# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The requests that servers get, and vLLM's benchmark client that sends them."""

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
    """Requests of one kind.

    Args:
        requests: The number of requests.
        text: The number of words of a question. A word is about a token, and the chat template adds some.
        output: The number of tokens of every answer. The end-of-sequence token is ignored.
        images: The number of images of a request.
        concurrency: The largest number of requests that are sent and not answered. None sends all at once.
        questions: The number of questions about each image, each of them a request. If there is more than
            one, images and questions are drawn by `write_image_set`, and the image comes before the text. If
            not, vLLM's `random-mm` draws them, and the text comes first.
        image_side: The width and height of an image in visual tokens. None for the model's.
    """

    requests: int
    text: int
    output: int
    images: int = 1
    concurrency: int | None = None
    questions: int = 1
    image_side: int | None = None

    def options(self, pixels: int, seed: int, folder: Path) -> list[str]:
        """The options of `vllm bench serve`.

        Args:
            pixels: The width and height of an image.
            seed: The seed of the requests. Requests of different seeds have nothing in common.
            folder: The folder in which images may be written.
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
    """Writes images and their questions in the format of vLLM's dataset `custom_image`.

    Args:
        folder: The folder to write to.
        workload: The requests.
        pixels: The width and height of an image.
        seed: The seed of the images and questions.

    Returns:
        The dataset's file.
    """
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
    """Sends requests to a server with `vllm bench serve`.

    Args:
        workload: The requests.
        url: The server's base URL.
        model: The folder of the model that the server serves.
        pixels: The width and height of an image.
        seed: The seed of the requests.
        slo: For each metric (`ttft`, `tpot`, `e2el`), the limit in milliseconds up to which a request counts
            for goodput.
        folder: The folder in which images may be written.

    Returns:
        The client's command line, and its output.

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
    # The client runs in this process, as another import of vLLM would take longer than many runs.
    with contextlib.redirect_stdout(printed):
        output = asyncio.run(main_async(parser.parse_args(options)))
    if output["completed"] != workload.requests:
        raise RuntimeError(
            f"{output['failed']} of {workload.requests} requests failed:\n{printed.getvalue()}"
        )
    plain = json.loads(json.dumps(output, default=float))  # It may contain numpy numbers.
    return ["vllm", "bench", "serve", *options], plain
