# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is measured: for each setup a model, and points at which one thing is varied at a time."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.serving.compare import label, named
from benchmarks.serving.models import LLAVA_7B, QUARTER, Llava
from benchmarks.serving.workload import Workload
from vllm_vtw.policy import Policy
from vllm_vtw.search.price import RequestTokens
from vllm_vtw.search.schedules.schedule import FIRST_LAYER, merge_stages

GIB = 1 << 10  # in MiB


@dataclass(frozen=True)
class Engine:
    """The options in which the servers of a setup differ.

    Args:
        kv_mib: The KV memory in MiB. None for what vLLM takes by default, which may differ with the plugin.
        prefix_caching: Whether prefix caching is on.
    """

    kv_mib: int | None
    prefix_caching: bool = False

    def options(self) -> list[str]:
        """The options of `vllm serve`."""
        memory = [] if self.kv_mib is None else [f"--kv-cache-memory-bytes={self.kv_mib << 20}"]
        return [*memory, f"--{'' if self.prefix_caching else 'no-'}enable-prefix-caching"]


@dataclass(frozen=True)
class Point:
    """One workload on one engine, for stock vLLM and for the plugin with each policy.

    Attributes:
        sweep: What is varied, such as `"output tokens"`.
        value: The value that it has, such as `"64"`.
        workload: The requests.
        engine: The options of the servers.
        policies: The plugin's policies.
    """

    sweep: str
    value: str
    workload: Workload
    engine: Engine
    policies: tuple[Policy, ...]

    @property
    def label(self) -> str:
        """The names of the point's rows in the tables."""
        return ", ".join(dict.fromkeys(label(self.sweep, self.value, policy) for policy in self.policies))


def told(measured: Point | Policy) -> dict[str, Any]:
    """A point or policy as results contain it, without the key `"gate"`. No policy here has gates."""

    def without_gate(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        assert found.pop("gate", None) is None
        return found

    return asdict(measured, dict_factory=without_gate)


@dataclass(frozen=True)
class Setup:
    """What one call of the benchmark measures.

    Args:
        model: The model, which is served with made-up weights.
        options: The options of `vllm serve` that all servers have.
        slo: For each metric (`ttft`, `tpot`), the limit in milliseconds up to which a request counts for
            goodput.
        points: The points, in the order in which the tables show them.
        resident: Whether all servers of an engine run at the same time, one busy and the others idle. Each is
            then started only once, but all of them need memory at the same time.
        env: Environment variables for the servers.
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
        """The setup with only those points that have `text` in their label, ignoring case.

        Raises:
            ValueError: There are no such points.
        """
        points = tuple(point for point in self.points if text.lower() in point.label.lower())
        if not points:
            labels = ", ".join(repr(point.label) for point in self.points)
            raise ValueError(f"{text!r} is in none of {labels}")
        return replace(self, points=points)

    def server_options(self, engine: Engine, policy: Policy | None, folder: Path) -> list[str]:
        """The options of `vllm serve`.

        Args:
            engine: The options in which servers differ.
            policy: The plugin's policy. None for stock vLLM.
            folder: The folder in which a policy file is written, if the policy needs one.
        """
        options = [*self.options, *engine.options()]
        if policy is None:
            return options
        vtw: dict[str, Any] = {"layer": policy.stages[0].layer}
        if policy.ranking is not None:
            file = folder / f"{named(policy).replace(' ', '-')}.json"
            file.write_text(json.dumps(policy.to_json(self.model.served_as)))
            vtw = {"policy": str(file)}
        return [*options, "--model-impl=vtw", f"--additional-config={json.dumps({'vtw': vtw})}"]


def vary(
    sweep: str,
    workload: Workload,
    engine: Engine,
    policy: Policy,
    name: str,
    values: Mapping[int, dict[str, Any]],
) -> list[Point]:
    """The points of a sweep over one field of a workload.

    Args:
        sweep: What is varied, as tables name it.
        workload: The workload that is varied.
        engine: The options of the servers.
        policy: The plugin's policy.
        name: The field of the workload that is varied.
        values: The values of the field, and for each the other fields that have another value than in
            `workload`.
    """
    return [
        Point(sweep, f"{value:,}", replace(workload, **{name: value}, **more), engine, (policy,))
        for value, more in values.items()
    ]


PUBLISHED = (
    *[1.0] * 2,
    *(0.65, 0.64, 0.62, 0.62, 0.62, 0.5, 0.5, 0.5, 0.5, 0.485),
    *[0.235] * 4,
    *[0.18] * 3,
    *[0.07] * 6,
    *(0.06, 0.04, 0.04, 0.04, 0.03, 0.03, 0.03),
)
"""G-Search's schedule for LLaVA-1.5-7B (arXiv 2412.00556): the fraction of visual tokens of each layer. It is
read off the paper's figure, which leaves out the last layer."""


def published_beside_vtw(model: Llava, workload: Workload) -> tuple[Policy, ...]:
    """`PUBLISHED` in four stages, and VTW with the largest K that takes no more of the decoder's work."""
    request = RequestTokens(model.visual_tokens, workload.text, workload.output)
    price = model.price(request)
    keeps = PUBLISHED[:: len(PUBLISHED) // model.layers]
    policy = merge_stages([*PUBLISHED[:FIRST_LAYER], *keeps[FIRST_LAYER:]], 4, price)
    most = price.flops_share(policy)
    vtw = [Policy.withdraw_at(layer, model.layers) for layer in range(1, model.layers)]
    return policy, max((one for one in vtw if price.flops_share(one) <= most), key=price.flops_share)


def small() -> Setup:
    """The setup for two CPU cores: a quarter of LLaVA-1.5's lengths, and KV memory for about six requests."""
    model, half = QUARTER, Policy.withdraw_at(8, QUARTER.layers)
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
            Point("K", "of 16", base, engine, (half, Policy.withdraw_at(12, model.layers))),
            *vary("output tokens", base, engine, half, "output", {4: {}, 64: {}, 128: {"requests": 8}}),
            *vary("words of text", few, engine, half, "text", {256: {}}),
            *vary("images a request", few, engine, half, "images", {2: {}}),
            *vary("requests at once", base, engine, half, "concurrency", {1: {"requests": 4}, 4: {}}),
            Point("KV memory", "enough for all", base, Engine(1 * GIB), (half,)),
            Point(
                "prefix caching",
                "4 questions an image",
                replace(base, questions=4),
                replace(engine, prefix_caching=True),
                (half,),
            ),
        ),
        resident=True,
        asynchronous=False,
        # By default, vLLM leaves one core to the API server. On two cores, that is half of the machine.
        env={"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))},
    )


def schedule() -> Setup:
    """The setup `small` with other policies: a ranked schedule, and VTW at no more of the decoder's work."""
    setup = small()
    k, *_ = setup.points
    policies = published_beside_vtw(setup.model, k.workload)
    return replace(setup, points=(replace(k, sweep="schedule", value="", policies=policies),))


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
"""The GiB of KV cache on GPUs of these sizes: 0.9 of the GPU's memory, less 14.1 GB for weights and 1.5 GB of
working memory."""


def cards() -> Setup:
    """The setup for LLaVA-1.5-7B's shape on one GPU, with the KV memory that GPUs of several sizes have."""
    half = Policy.withdraw_at(16, LLAVA_7B.layers)
    workloads = (GPU_BASE, replace(GPU_BASE, requests=512), replace(GPU_BASE, requests=1024))
    points = [
        Point("KV memory", f"{card} card", workload, Engine(int(gib * GIB)), (half,))
        for (card, gib), workload in zip(CARDS.items(), workloads, strict=True)
    ]
    whole = Point("KV memory", "whole card", replace(GPU_BASE, requests=1536), Engine(None), (half,))
    return Setup(LLAVA_7B, GPU_OPTIONS, GPU_SLO, (*points, whole))


def full() -> Setup:
    """The setup for LLaVA-1.5-7B's shape on one GPU, in which one thing is varied at a time."""
    base, engine, half = GPU_BASE, Engine(8 * GIB), Policy.withdraw_at(16, LLAVA_7B.layers)
    memory = {8: 256, 16: 512, 24: 512, 40: 1024, 80: 1536}
    return Setup(
        LLAVA_7B,
        GPU_OPTIONS,
        GPU_SLO,
        (
            Point("K", "of 32", base, engine, tuple(Policy.withdraw_at(k, 32) for k in (8, 16, 24))),
            Point("schedule", "", base, engine, published_beside_vtw(LLAVA_7B, base)),
            *vary("output tokens", base, engine, half, "output", {16: {}, 64: {}, 256: {}, 512: {}}),
            *vary("words of text", base, engine, half, "text", {256: {}, 1024: {}}),
            *vary("images a request", base, engine, half, "images", {2: {}, 4: {"requests": 128}}),
            *vary(
                "requests at once",
                base,
                engine,
                half,
                "concurrency",
                {1: {"requests": 16}, 4: {"requests": 64}, 16: {}},
            ),
            *(
                Point("KV memory", f"{gib} GiB", replace(base, requests=requests), Engine(gib * GIB), (half,))
                for gib, requests in memory.items()
            ),
            Point("KV memory", "whole card", replace(base, requests=1536), Engine(None), (half,)),
            Point(
                "prefix caching",
                "4 questions an image",
                replace(base, questions=4),
                replace(engine, prefix_caching=True),
                (half,),
            ),
        ),
    )


SETUPS = {"small": small, "schedule": schedule, "cards": cards, "full": full}
