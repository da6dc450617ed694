"""What withdrawal costs the host in a decode step: the attention metadata, beside stock vLLM's."""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
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
from vllm_vtw.worker.step import StageStep

MODEL = SmallLlava(layers=4, image_side=4)
STEPS = 64
Samples = dict[str, list[float]]


def timed(owner: Any, name: str, samples: list[float]) -> Callable[[], None]:
    """Adds the CPU microseconds of every call of a method to `samples`, until what it returns is called."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time_ns()
        try:
            return original(*args, **kwargs)
        finally:
            samples.append((time.thread_time_ns() - start) / 1000)

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, original)


def decode(folder: Path, requests: int, vtw: dict[str, Any] | None) -> Samples:
    """CPU microseconds of metadata in every decode step of `requests` requests, each with a picture."""
    plugin = {} if vtw is None else {"model_impl": "vtw", "additional_config": {"vtw": vtw}}
    engine = LLM(
        model=str(folder),
        dtype="float32",
        block_size=32,
        max_model_len=256,
        max_num_seqs=requests,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        enforce_eager=True,
        **plugin,
    )
    side = MODEL.image_side * PATCH_SIZE
    image = Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8))
    prompt = {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": image}}
    params = SamplingParams(temperature=0, max_tokens=2 * STEPS + 16, ignore_eos=True)
    for index in range(requests):
        engine.llm_engine.add_request(str(index), prompt, params)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    while any(request.num_output_tokens == 0 for request in scheduler.requests.values()):
        engine.llm_engine.step()
    samples: Samples = defaultdict(list)
    whole = [(GPUModelRunner, "_build_attention_metadata"), (GPUModelRunner, "_get_slot_mappings")]
    parts = [
        (StageStep, "place"),
        (StageStep, "write_slots"),
        (StageStep, "metadata"),
        (CPUAttentionMetadataBuilder, "build"),
    ]
    # The parts in steps of their own: a clock inside another would be counted by it.
    for methods in (whole, parts):
        undo = [timed(owner, name, samples[name]) for owner, name in methods]
        for _ in range(STEPS):
            engine.llm_engine.step()
        for restore in undo:
            restore()
    engine.llm_engine.engine_core.shutdown()
    return samples


def total(medians: dict[str, float]) -> float:
    return medians["_build_attention_metadata"] + medians["_get_slot_mappings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs: list[tuple[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL.save(Path(folder) / "model")
        for name in ("stock", "vtw", "vtw", "stock") * 2:
            options = {"layer": MODEL.layers // 2} if name == "vtw" else None
            samples = decode(model, arguments.requests, options)
            medians = {
                part: round(statistics.median(values), 1) for part, values in samples.items() if values
            }
            runs.append((name, medians))
            print(f"{name:>6}: {total(medians):.0f} us a step; {medians}", flush=True)
    stock, vtw = (
        statistics.mean(total(medians) for name, medians in runs if name == side) for side in ("stock", "vtw")
    )
    print(f"\n{vtw - stock:.0f} us of CPU time a step more than the {stock:.0f} us of stock vLLM")
    if arguments.output:
        result = {
            "requests": arguments.requests,
            "steps": STEPS,
            "median_cpu_microseconds_in_order": runs,
            "vtw_minus_stock": round(vtw - stock, 1),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "machine": f"{processor()}, {os.cpu_count()} cores",
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
