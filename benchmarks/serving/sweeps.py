"""What is measured: models, engines, and one thing varied at a time."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.serving.compare import label
from benchmarks.serving.models import LLAVA_7B, QUARTER, Llava
from benchmarks.serving.workload import Workload

GIB = 1 << 10


@dataclass(frozen=True)
class Engine:
    """Options in which the servers of a sweep differ.

    Args:
        kv_mib: KV memory; None for what vLLM takes by itself, which may be other with the plugin.
        prefix_caching: On or off.
    """

    kv_mib: int | None
    prefix_caching: bool = False

    def options(self) -> list[str]:
        """Of `vllm serve`."""
        memory = [] if self.kv_mib is None else [f"--kv-cache-memory-bytes={self.kv_mib << 20}"]
        return [*memory, f"--{'' if self.prefix_caching else 'no-'}enable-prefix-caching"]


@dataclass(frozen=True)
class Point:
    """One workload on one engine, for stock vLLM and for the plugin at each K of `layers`.

    `sweep` names what is varied, `value` says to what.
    """

    sweep: str
    value: str
    workload: Workload
    engine: Engine
    layers: tuple[int, ...]

    @property
    def label(self) -> str:
        """The rows of the tables that it makes."""
        return ", ".join(dict.fromkeys(label(self.sweep, self.value, layer) for layer in self.layers))


@dataclass(frozen=True)
class Setup:
    """What is measured in one go.

    Args:
        model: Served with weights that are made up.
        options: Of `vllm serve`, for all.
        slo: Milliseconds by metric that a request has to keep to count for goodput.
        points: In the order in which they are shown.
        resident: Whether all servers of an engine run at the same time, one at work and the others idle. It
            saves starting them again, and takes memory for all.
        env: Environment variables of the servers.
        asynchronous: Whether the engine prepares a step while the model computes the one before, as vLLM does
            on CUDA.
    """

    model: Llava
    options: tuple[str, ...]
    slo: Mapping[str, float]
    points: tuple[Point, ...]
    resident: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    asynchronous: bool = True

    def chosen(self, text: str) -> "Setup":
        """The points alone with `text` in their label, in capitals or not.

        Raises:
            ValueError: There is none.
        """
        points = tuple(point for point in self.points if text.lower() in point.label.lower())
        if not points:
            labels = ", ".join(repr(point.label) for point in self.points)
            raise ValueError(f"{text!r} is in none of {labels}")
        return replace(self, points=points)

    def server_options(self, engine: Engine, layer: int | None) -> list[str]:
        """Of `vllm serve`, with the plugin at K = `layer`; None is stock vLLM."""
        options = [*self.options, *engine.options()]
        if layer is not None:
            vtw = json.dumps({"vtw": {"layer": layer}})
            options += ["--model-impl=vtw", f"--additional-config={vtw}"]
        return options


def vary(
    sweep: str,
    workload: Workload,
    engine: Engine,
    layer: int,
    name: str,
    values: Mapping[int, dict[str, Any]],
) -> list[Point]:
    """A point for each value of a field of the workload, with what else of it is another there."""
    return [
        Point(sweep, f"{value:,}", replace(workload, **{name: value}, **more), engine, (layer,))
        for value, more in values.items()
    ]


def small() -> Setup:
    """On two cores of a CPU: all lengths a quarter of LLaVA-1.5's, and KV memory for six requests or so."""
    model, layer = QUARTER, QUARTER.layers // 2
    base = Workload(requests=16, text=8, output=32)
    engine = Engine(kv_mib=168)
    few = replace(base, requests=8)
    return Setup(
        model,
        (
            "--load-format=dummy",
            "--dtype=float32",
            "--block-size=32",
            "--max-model-len=512",
            "--max-num-batched-tokens=2048",
            "--enforce-eager",
            '--limit-mm-per-prompt={"image": 4}',
        ),
        {"ttft": 10_000, "tpot": 150},
        (
            Point("K", "of 16", base, engine, (8, 12)),
            *vary("output tokens", base, engine, layer, "output", {4: {}, 64: {}, 128: {"requests": 8}}),
            *vary("words of text", few, engine, layer, "text", {256: {}}),
            *vary("images a request", few, engine, layer, "images", {2: {}}),
            *vary("requests at once", base, engine, layer, "concurrency", {1: {"requests": 4}, 4: {}}),
            Point("KV memory", "enough for all", base, Engine(1 * GIB), (layer,)),
            Point(
                "prefix caching",
                "4 questions an image",
                replace(base, questions=4),
                replace(engine, prefix_caching=True),
                (layer,),
            ),
        ),
        resident=True,
        asynchronous=False,
        # By default vLLM leaves a core to the API server, which is half of this machine.
        env={"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))},
    )


GPU_OPTIONS = (
    "--load-format=dummy",
    "--dtype=bfloat16",
    "--max-model-len=4096",
    "--max-num-seqs=1024",
    "--max-num-batched-tokens=8192",
    '--limit-mm-per-prompt={"image": 4}',
)
GPU_SLO = {"ttft": 5_000, "tpot": 50}
GPU_BASE = Workload(requests=256, text=56, output=128)
CARDS = {"24 GB": 5.6, "40 GB": 19.0, "80 GB": 52.5}
"""GiB for the KV cache on cards of so much: 0.9 of it less 14.1 GB for weights and 1.5 GB to work in."""


def cards() -> Setup:
    """LLaVA-1.5-7B's shape on one GPU, in the KV memory that it has on cards of several sizes."""
    workloads = (GPU_BASE, replace(GPU_BASE, requests=512), replace(GPU_BASE, requests=1024))
    points = [
        Point("KV memory", f"{card} card", workload, Engine(int(gib * GIB)), (16,))
        for (card, gib), workload in zip(CARDS.items(), workloads, strict=True)
    ]
    whole = Point("KV memory", "whole card", replace(GPU_BASE, requests=1536), Engine(None), (16,))
    return Setup(LLAVA_7B, GPU_OPTIONS, GPU_SLO, (*points, whole))


def full() -> Setup:
    """LLaVA-1.5-7B's shape on one GPU: one thing varied at a time."""
    base, engine, layer = GPU_BASE, Engine(8 * GIB), 16
    memory = {8: 256, 16: 512, 24: 512, 40: 1024, 80: 1536}
    return Setup(
        LLAVA_7B,
        GPU_OPTIONS,
        GPU_SLO,
        (
            Point("K", "of 32", base, engine, (8, 16, 24)),
            *vary("output tokens", base, engine, layer, "output", {16: {}, 64: {}, 256: {}, 512: {}}),
            *vary("words of text", base, engine, layer, "text", {256: {}, 1024: {}}),
            *vary("images a request", base, engine, layer, "images", {2: {}, 4: {"requests": 128}}),
            *vary(
                "requests at once",
                base,
                engine,
                layer,
                "concurrency",
                {1: {"requests": 16}, 4: {"requests": 64}, 16: {}},
            ),
            *(
                Point(
                    "KV memory", f"{gib} GiB", replace(base, requests=requests), Engine(gib * GIB), (layer,)
                )
                for gib, requests in memory.items()
            ),
            Point("KV memory", "whole card", replace(base, requests=1536), Engine(None), (layer,)),
            Point(
                "prefix caching",
                "4 questions an image",
                replace(base, questions=4),
                replace(engine, prefix_caching=True),
                (layer,),
            ),
        ),
    )


SETUPS = {"small": small, "cards": cards, "full": full}
