# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures the CPU time that attention metadata takes in a decode step, in stock vLLM and with the plugin.

A second KV-cache group takes time in stock vLLM, too. Therefore a third engine is measured: stock vLLM with a
sliding window in half of the layers, which has two groups.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import torch
import vllm
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from benchmarks.machine import processor
from benchmarks.small_llava import PATCH_SIZE, SmallLlava
from vllm_vtw.worker.stage_step import StageStep

MODEL = SmallLlava(layers=16, image_side=4)
MAX_MODEL_LEN = 512
ROUNDS = 5
"""The number of rounds. In each, every engine decodes four bursts of steps. The engines take turns, twice in
the order ABCDDCBA, because the machine's speed changes within seconds."""
STEPS, UNCOUNTED = 20, 4
"""The number of steps of a burst, and how many of them are not counted. Those are the first ones, when the
processor's caches still hold the data of another engine."""
LAYER = MODEL.layers // 2
ENGINES: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock, two groups": {
        "hf_overrides": {
            "text_config": {
                "layer_types": ["full_attention"] * LAYER + ["sliding_attention"] * (MODEL.layers - LAYER),
                "sliding_window": MAX_MODEL_LEN,
            }
        }
    },
    "vtw": {"model_impl": "vtw", "additional_config": {"vtw": {"layer": LAYER}}},
    # A group of 10 layers before K, and groups of 5 and 1 behind it, whose blocks hold 2 and 10 pages.
    "vtw, pages": {"model_impl": "vtw", "additional_config": {"vtw": {"layer": 10}}},
}
Samples = dict[str, list[float]]
WHOLE = [(GPUModelRunner, "_build_attention_metadata"), (GPUModelRunner, "_get_slot_mappings")]
PARTS = [
    (StageStep, "set_ranks"),
    (StageStep, "write_slots"),
    (StageStep, "metadata"),
    (CPUAttentionMetadataBuilder, "build"),
]


def timed(owner: Any, name: str, samples: list[float]) -> Callable[[], None]:
    """Measures every call of a method, in microseconds of CPU time.

    Args:
        owner: The class that has the method.
        name: The method's name.
        samples: Receives the time of every call.

    Returns:
        A function that ends the measurement.
    """
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time_ns()
        try:
            return original(*args, **kwargs)
        finally:
            samples.append((time.thread_time_ns() - start) / 1000)

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, original)


def decode(pipe: Connection, folder: Path, requests: int, options: dict[str, Any]) -> None:
    """Runs an engine that decodes a burst of steps whenever it receives True, and ends at False.

    After each burst, it sends the CPU time of each call of each method, in microseconds.

    Args:
        pipe: The connection to the process that measures.
        folder: The checkpoint.
        requests: The number of requests, each with an image.
        options: Options of the engine.
    """
    engine = LLM(
        model=str(folder),
        dtype="float32",
        block_size=32,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=requests,
        kv_cache_memory_bytes=1200 << 20,
        enable_prefix_caching=False,
        enforce_eager=True,
        **options,
    )
    side = MODEL.image_side * PATCH_SIZE
    image = Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8))
    prompt = {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": image}}
    params = SamplingParams(temperature=0, max_tokens=4 * ROUNDS * STEPS + 16, ignore_eos=True)
    for index in range(requests):
        engine.llm_engine.add_request(str(index), prompt, params)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        engine.llm_engine.step()
    pipe.send({})
    # The parts have bursts of their own. Otherwise the time to measure them would be counted in the whole.
    for methods in itertools.chain.from_iterable(itertools.repeat((WHOLE, WHOLE, PARTS, PARTS))):
        if not pipe.recv():
            break
        samples: Samples = defaultdict(list)
        for _ in range(UNCOUNTED):
            engine.llm_engine.step()
        undo = [timed(owner, name, samples[name]) for owner, name in methods]
        for _ in range(STEPS - UNCOUNTED):
            engine.llm_engine.step()
        for restore in undo:
            restore()
        pipe.send(dict(samples))


def engine(folder: Path, requests: int, options: dict[str, Any]) -> Connection:
    """Starts a process that runs `decode`, and returns the connection to it once all requests decode."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=decode, args=(theirs, folder, requests, options), daemon=True).start()
    ours.recv()
    return ours


def total(medians: dict[str, float]) -> float:
    """The microseconds of a step's attention metadata: the sum of the medians of `WHOLE`."""
    return sum(medians[name] for _, name in WHOLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    samples: dict[str, Samples] = {name: defaultdict(list) for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL.save(Path(folder) / "model")
        engines = {name: engine(model, arguments.requests, options) for name, options in ENGINES.items()}
        for name in [*engines, *reversed(engines)] * 2 * ROUNDS:
            engines[name].send(True)
            for method, times in engines[name].recv().items():
                samples[name][method] += times
        for pipe in engines.values():
            pipe.send(False)
    medians = {
        name: {method: round(statistics.median(times), 1) for method, times in methods.items() if times}
        for name, methods in samples.items()
    }
    totals = {name: total(parts) for name, parts in medians.items()}
    for name, parts in medians.items():
        more = totals[name] - totals["stock"]
        print(f"{name:>17}: {totals[name]:.0f} us a step, {more:.0f} more than stock vLLM; {parts}")
    if arguments.output:
        result = {
            "requests": arguments.requests,
            "steps_of_each": 2 * ROUNDS * (STEPS - UNCOUNTED),
            "order": f"bursts of {STEPS} steps, ABCDDCBA",
            "median_cpu_microseconds": medians,
            "more_than_stock": {name: round(us - totals["stock"], 1) for name, us in totals.items()},
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "machine": f"{processor()}, {os.cpu_count()} cores",
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
