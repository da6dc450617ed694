# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what the prompt of a long video costs an engine's host, in stock vLLM and with the plugin.

The model is tiny, so that the work beside it shows. It is of Qwen3-VL's architecture, in which every two
frames are a run of visual tokens, and timestamps between them stay. The prompt is computed in chunks.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections import defaultdict
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from benchmarks.machine import measured_on
from benchmarks.plan_cost import timed
from benchmarks.serving.models import Model
from benchmarks.serving.qwen_vl import VIDEO
from vllm_vtw.worker.current_step import CurrentStep

MODEL = Model("6 layers of width 64", 6, 64, 96, 2, 1024, 8, 8, 144, "qwen3_vl", kv_heads=1)
LAYER = 4
CHUNK = 2048
MAX_MODEL_LEN = 65536
FRAMES = (100, 200, 500, 1000)
ROUNDS = 2
"""The number of rounds. In each, both engines compute all videos, in the order ABBA."""
ENGINES: dict[str, dict[str, Any]] = {
    "stock": {},
    "vtw": {"model_impl": "vtw", "additional_config": {"vtw": {"layer": LAYER, "align": False}}},
}
PARTS = ("arrival", "scheduler", "KV manager", "attention metadata", "step plan")


def measured_parts(core: Any) -> dict[str, tuple[type, str]]:
    """The methods that are measured, each as its class and its name.

    The scheduler's time contains that of the KV manager. `arrival` is once a request, the others are once a
    step.

    Args:
        core: vLLM's `EngineCore`.
    """
    methods = (
        (type(core.scheduler), "add_request"),
        (type(core.scheduler), "schedule"),
        (type(core.scheduler.kv_cache_manager), "allocate_slots"),
        (GPUModelRunner, "_build_attention_metadata"),
        (CurrentStep, "begin"),
    )
    return dict(zip(PARTS, methods, strict=True))


def prompt(frames: int) -> dict[str, Any]:
    """A prompt with a video, of which all frames are taken."""
    side = MODEL.pixels()
    metadata = {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    text = f"USER: <|vision_start|>{VIDEO}<|vision_end|> What happens? ASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"video": [(pixels, metadata)]}}


def resident_mib() -> int:
    """The MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def compute(pipe: Connection, folder: Path, options: dict[str, Any]) -> None:
    """Runs an engine that computes the prompt of a video of so many frames whenever it receives their number.

    It sends the numbers of tokens and steps, the largest share of the KV cache that was in use, how much more
    memory the process had between steps than before the request, and by part the CPU time of every call in
    microseconds. It ends at 0.

    Args:
        pipe: The connection to the process that measures.
        folder: The model.
        options: Options of the engine.
    """
    engine = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="float32",
        block_size=32,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=2,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        enforce_eager=True,
        mm_processor_cache_gb=0,
        skip_mm_profiling=True,
        limit_mm_per_prompt={"image": 0, "video": 1},
        hf_overrides={"text_config": {"max_position_embeddings": MAX_MODEL_LEN}},
        **options,
    ).llm_engine
    core = engine.engine_core.engine_core
    scheduler = core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for part, (owner, name) in measured_parts(core).items():
        timed(owner, name, samples[part])
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    pipe.send(None)
    while frames := pipe.recv():
        for times in samples.values():
            times.clear()
        request_of_video, before = prompt(frames), resident_mib()
        engine.add_request("video", request_of_video, params)
        (request,) = scheduler.requests.values()
        free, mib = [], []
        while engine.has_unfinished_requests():
            engine.step()
            free.append(pool.get_num_free_blocks())
            mib.append(resident_mib())
        pipe.send(
            {
                "prompt_tokens": request.num_prompt_tokens,
                "steps": len(free),
                "kv_share": 1 - min(free) / pool.num_gpu_blocks,
                "more_mib": max(mib) - before,
                "microseconds": {part: list(times) for part, times in samples.items()},
            }
        )


def engine(folder: Path, options: dict[str, Any]) -> Connection:
    """Starts a process that runs `compute`, and returns the connection to it once the engine has started."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=compute, args=(theirs, folder, options), daemon=True).start()
    ours.recv()
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, Any] = {**measured_on(), "model": asdict(MODEL), "layer": LAYER, "chunk": CHUNK}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL.save(Path(folder) / "model")
        engines = {name: engine(model, options) for name, options in ENGINES.items()}
        for pipe in engines.values():
            pipe.send(FRAMES[0])  # not counted
            pipe.recv()
        for frames in FRAMES:
            for name in [*engines, *reversed(engines)] * ROUNDS:
                engines[name].send(frames)
                runs[name, frames].append(engines[name].recv())
        for pipe in engines.values():
            pipe.send(0)
    result = measured | {"videos": []}
    for (name, frames), of_video in runs.items():
        row: dict[str, Any] = {"engine": name, "frames": frames}
        for key in ("prompt_tokens", "steps", "kv_share", "more_mib"):
            row[key] = max(run[key] for run in of_video)
        row["median_microseconds"] = {
            part: round(statistics.median(one for run in of_video for one in run["microseconds"][part]), 1)
            for part in PARTS
            if of_video[0]["microseconds"][part]
        }
        print(json.dumps(row))
        result["videos"].append(row)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
