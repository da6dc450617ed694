"""Says where an engine's time goes, part by part, in stock vLLM and with the plugin.

    python -m benchmarks.serving.profile [small | cards | full] [--only TEXT] [--output FILE]

PyTorch's profiler watches an engine that answers a point's requests all at once. On a GPU times are those of
the kernels that a part started; on a CPU, of the part itself.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in the process that is watched

import numpy as np
import torch
from PIL import Image
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import measured_on
from benchmarks.serving.run import Side
from benchmarks.serving.sweeps import SETUPS, Point, Setup

MARK = "part: "
REST = "the rest"


def parts(llm: Any) -> list[tuple[type, str, str]]:
    """Class, method and name of what is told apart. What a part has inside it of another is the other's."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_vtw.models.decoder import StagedDecoder
    from vllm_vtw.worker.step import CurrentStep, StageStep

    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    model, scheduler = type(runner.get_model()), type(core.scheduler)
    found = [
        (LLMEngine, "step", REST),
        (scheduler, "schedule", "scheduler"),
        (scheduler, "update_from_output", "scheduler"),
        (model, "embed_multimodal", "vision tower"),
        (model, "compute_logits", "logits and sampling"),
        (StagedDecoder, "__call__", "gather and scatter"),
        (StagedDecoder, "_run", "decoder"),
        *((StageStep, method, "step plan") for method in ("place", "write_slots", "metadata")),
        (CurrentStep, "begin", "step plan"),
    ]
    if hasattr(runner, "_build_attention_metadata"):  # model runner V1
        kind = type(runner)
        return [
            *found,
            (kind, "_prepare_inputs", "batch and attention metadata"),
            (kind, "_build_attention_metadata", "batch and attention metadata"),
            (kind, "_model_forward", "decoder"),
            (kind, "_sample", "logits and sampling"),
        ]
    graphs = type(runner.cudagraph_manager)
    return [
        *found,
        (type(runner), "prepare_inputs", "batch and attention metadata"),
        (type(runner), "prepare_attn", "batch and attention metadata"),
        (type(runner.model_state), "prepare_attn", "batch and attention metadata"),
        (graphs, "run_fullgraph", "decoder"),
        (graphs, "run_pw_graph", "decoder"),
        (model, "forward", "decoder"),
        (type(runner), "sample", "logits and sampling"),
    ]


def mark(owner: type, method: str, part: str) -> None:
    original = getattr(owner, method)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return original(*args, **kwargs)

    setattr(owner, method, marked)


def seconds_by_part(events: list[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Each part's time, without that of the parts inside it."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if not event.name.startswith(MARK) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        took = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        seconds[event.name.removeprefix(MARK)] += took
        around = event.cpu_parent
        while around is not None and not around.name.startswith(MARK):
            around = around.cpu_parent
        if around is not None:
            seconds[around.name.removeprefix(MARK)] -= took
    return dict(seconds)


def engine_options(setup: Setup, point: Point, side: Side) -> dict[str, Any]:
    """`vllm serve`'s options as those of `LLM`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = [*setup.options, *point.engine.options()]
    if side is not None:
        options += ["--model-impl=vtw", "--additional-config=" + json.dumps({"vtw": {"layer": side}})]
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(options)
    names = [
        option.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for option in options
    ]
    return {name: getattr(parsed, name) for name in names}


def profiled(setup: Setup, point: Point, side: Side) -> dict[str, float]:
    """Seconds by part of one engine, in this process."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(model=str(setup.model.save(Path(folder))), **engine_options(setup, point, side))
    for part in parts(llm):
        mark(*part)
    workload, pixels = point.workload, setup.model.pixels
    rng = np.random.default_rng(0)

    def request() -> dict[str, Any]:
        images = [
            Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))
            for _ in range(workload.images)
        ]
        text = "the " * workload.text
        prompt = "USER: " + "<image>\n" * workload.images + text + "ASSISTANT:"
        return {"prompt": prompt, "multi_modal_data": {"image": images}}

    answer = SamplingParams(temperature=0, max_tokens=workload.output, ignore_eos=True, detokenize=False)
    llm.generate([request()], answer, use_tqdm=False)
    requests = [request() for _ in range(workload.requests)]
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        llm.generate(requests, answer, use_tqdm=False)
    return seconds_by_part(list(profiler.events() or []), on_gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("setup", nargs="?", choices=SETUPS, default="small")
    parser.add_argument(
        "--only", default="", help="profile the first point whose sweep or value contains this"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    setup = SETUPS[arguments.setup]()
    points = [point for point in setup.points if arguments.only in f"{point.sweep} {point.value}"]
    if not points:
        parser.error(f"no sweep's name or value contains {arguments.only!r}")
    point, sides = points[0], (None, points[0].layers[len(points[0].layers) // 2])
    seconds = []
    for side in sides:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds.append(pool.submit(profiled, setup, point, side).result())
    stock, vtw = seconds
    print(f"{point.sweep} {point.value}, stock and K = {sides[1]}, seconds:")
    for part in sorted(stock | vtw, key=lambda part: -(stock | vtw)[part]):
        print(f"{part:>30} {stock.get(part, 0):8.2f} {vtw.get(part, 0):8.2f}")
    print(f"{'all':>30} {sum(stock.values()):8.2f} {sum(vtw.values()):8.2f}")
    if arguments.output:
        result = {
            **measured_on(),
            "setup": arguments.setup,
            "point": asdict(point),
            "layer": sides[1],
            "seconds": {"stock": stock, "vtw": vtw},
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
