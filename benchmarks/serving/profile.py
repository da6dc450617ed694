# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures how much time each part of an engine takes, in stock vLLM and with the plugin.

    python -m benchmarks.serving.profile [SETUP] [--only TEXT...] [--output FILE]

PyTorch's profiler records an engine that answers up to 32 of a point's requests, all at once.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # The engine has to run in the process that is profiled.

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import measured_on
from benchmarks.serving.compare import label, named
from benchmarks.serving.run import Side
from benchmarks.serving.setups import SETUPS
from benchmarks.serving.sweeps import Point, Setup, told

MARK = "part: "
REST = "the rest"
MOST_REQUESTS = 32


def parts(llm: Any) -> list[tuple[type, str, str]]:
    """The methods whose time is measured, each as its class, its name and the part that it belongs to.

    If a part calls another part, that time counts only for the other part.
    """
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_vtw.models.decoder import StagedDecoder
    from vllm_vtw.worker.current_step import CurrentStep
    from vllm_vtw.worker.stage_step import StageStep

    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    model, scheduler = type(runner.get_model()), type(core.scheduler)
    decoders = [getattr(module, "staged_decoder", None) for module in runner.get_model().modules()]
    segments = [segment for decoder in decoders if decoder for segment in decoder.segments.values()]
    found = [
        (LLMEngine, "step", REST),
        (scheduler, "schedule", "scheduler"),
        (scheduler, "update_from_output", "scheduler"),
        (model, "embed_multimodal", "vision tower"),
        (model, "compute_logits", "logits and sampling"),
        (StagedDecoder, "__call__", "gather and scatter"),
        *((type(segment), "__call__", "decoder") for segment in segments),
        *((StageStep, method, "step plan") for method in ("set_ranks", "write_slots", "metadata")),
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
    """Has the profiler record every call of a method as a call of a part."""
    original = getattr(owner, method)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return original(*args, **kwargs)

    setattr(owner, method, marked)


@dataclass(frozen=True)
class Seconds:
    """The seconds that each part took, without other parts that it called.

    Attributes:
        host: The host's seconds, by part.
        gpu: The seconds of the GPU kernels that a part started, by part.
    """

    host: dict[str, float]
    gpu: dict[str, float]

    @classmethod
    def of(cls, events: Iterable[FunctionEvent]) -> "Seconds":
        """Sums up what PyTorch's profiler recorded."""
        host: dict[str, float] = defaultdict(float)
        gpu: dict[str, float] = defaultdict(float)
        kernels = 0.0
        for event in events:
            if event.device_type != DeviceType.CPU:
                # On the GPU, the event of a mark includes the gaps between its kernels.
                kernels += 0 if event.name.startswith(MARK) else event.time_range.elapsed_us() / 1e6
                continue
            around = _part_around(event.cpu_parent)
            if part := _part(event):
                host[part] += event.cpu_time_total / 1e6
                if around:
                    host[around] -= event.cpu_time_total / 1e6
            for kernel in event.kernels:
                if not kernel.name.startswith(MARK):
                    gpu[part or around or REST] += kernel.duration / 1e6
        if kernels:
            gpu["of no part"] = kernels - sum(gpu.values())
        return cls(dict(host), dict(gpu))


def _part(event: FunctionEvent) -> str:
    """The part that an event marks. Empty if it marks none."""
    return event.name.removeprefix(MARK) if event.name.startswith(MARK) else ""


def _part_around(event: FunctionEvent | None) -> str:
    """The innermost part that an event belongs to, the event included. Empty if there is none."""
    while event is not None and not _part(event):
        event = event.cpu_parent
    return "" if event is None else _part(event)


def profiled(setup: Setup, point: Point, side: Side) -> Seconds:
    """Runs an engine in this process, and returns the seconds of its parts.

    Args:
        setup: The setup that the point belongs to.
        point: The workload and the engine's options.
        side: The plugin's policy. None for stock vLLM.
    """
    os.environ.update(setup.env)
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with tempfile.TemporaryDirectory() as folder:
        options = setup.server_options(point.engine, side, Path(folder))
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        model = str(setup.model.save(Path(folder)))
        llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options])))
    for part in parts(llm):
        mark(*part)
    workload = point.workload
    pixels = setup.model.pixels(workload.image_side)
    rng = np.random.default_rng(0)

    def request() -> dict[str, Any]:
        images = [
            Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))
            for _ in range(workload.images)
        ]
        prompt = "USER: " + setup.model.placeholder * workload.images + "the " * workload.text + "ASSISTANT:"
        return {"prompt": prompt, "multi_modal_data": {"image": images}}

    answer = SamplingParams(temperature=0, max_tokens=workload.output, ignore_eos=True, detokenize=False)
    llm.generate([request()], answer, use_tqdm=False)
    requests = [request() for _ in range(min(workload.requests, MOST_REQUESTS))]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        llm.generate(requests, answer, use_tqdm=False)
    return Seconds.of(profiler.events() or [])


def table(sides: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of the seconds of each part, the largest first.

    Args:
        sides: The seconds by part, for `"stock"` and `"vtw"`.
    """
    stock, vtw = sides["stock"], sides["vtw"]
    rows = {part: (stock.get(part, 0), vtw.get(part, 0)) for part in stock.keys() | vtw}
    rows = dict(sorted(rows.items(), key=lambda row: -max(row[1])))
    rows["all"] = (sum(stock.values()), sum(vtw.values()))
    lines = ["| part | stock, s | vtw, s | saved, s |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {part} | {of_stock:.2f} | {of_vtw:.2f} | {of_stock - of_vtw:.2f} |"
        for part, (of_stock, of_vtw) in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("setup", nargs="?", choices=SETUPS, default="small")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="for each, the first point with it in its name",
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    try:
        setup = SETUPS[arguments.setup]()
        points = [setup.chosen(text).points[0] for text in arguments.only]
    except ValueError as wrong:
        parser.error(str(wrong))
    for point in points:
        if point.workload.concurrency or point.workload.questions > 1:
            parser.error(f"{point.label!r} does not send its requests all at once, each with its own image")
    result = {
        **measured_on(),
        "command": shlex.join(["python", "-m", "benchmarks.serving.profile", *sys.argv[1:]]),
        "profiles": [],
    }
    for point in points:
        policy = min(point.policies, key=lambda one: abs(one.stages[0].layer - setup.model.layers / 2))
        seconds = {}
        for name, side in (("stock", None), ("vtw", policy)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds[name] = pool.submit(profiled, setup, point, side).result()
        sides = {name: asdict(side) for name, side in seconds.items()}
        result["profiles"].append(
            {
                "row": label(point.sweep, point.value, policy),
                "point": told(point),
                "policy": told(policy),
                "seconds": sides,
            }
        )
        print(f"{label(point.sweep, point.value, policy)}, {named(policy)}, of the host:\n")
        print(table({name: side.host for name, side in seconds.items()}))
        if seconds["stock"].gpu:
            print("\nOf the GPU:\n")
            print(table({name: side.gpu for name, side in seconds.items()}))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
