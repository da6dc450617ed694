# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The setups: for each a model, and points at which one thing is varied at a time."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.serving.models import (
    LLAVA_7B,
    QUARTER,
    QWEN2_5_VL_7B,
    QWEN3_VL_8B,
    QWEN3_VL_30B_A3B,
    SMALL_QWEN,
    Model,
)
from benchmarks.serving.sweeps import Engine, Point, Setup, vary
from benchmarks.serving.workload import Workload
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import RequestTokens
from vllm_vtw.search.schedules.schedule import FIRST_RANKED_LAYER, merge_stages

GIB = 1 << 10  # in MiB


def limit(model: Model) -> str:
    """The option of `vllm serve` that allows up to four images a request, and no videos."""
    limits = {"image": 4} if model.model_type == "llava" else {"image": 4, "video": 0}
    return f"--limit-mm-per-prompt={json.dumps(limits)}"


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


def published_beside_vtw(model: Model, workload: Workload) -> tuple[Policy, ...]:
    """`PUBLISHED` in four stages, and VTW with the largest K that takes no more of the decoder's work."""
    request = RequestTokens(model.visual_tokens(workload.image_side), workload.text, workload.output)
    price = model.price(request)
    keeps = PUBLISHED[:: len(PUBLISHED) // model.layers]
    policy = merge_stages([*PUBLISHED[:FIRST_RANKED_LAYER], *keeps[FIRST_RANKED_LAYER:]], 4, price)
    most = price.flops_share(policy)
    vtw = [Policy.withdraw_at(layer, model.layers) for layer in range(1, model.layers)]
    return policy, max((one for one in vtw if price.flops_share(one) <= most), key=price.flops_share)


CPU_OPTIONS = (
    "--load-format=dummy",
    "--dtype=float32",
    "--block-size=32",
    "--max-num-batched-tokens=2048",
    "--enforce-eager",
)
CPU_SLO = {"ttft": 10_000, "tpot": 150}


def cpu_env() -> dict[str, str]:
    """Environment variables that let servers use all cores.

    By default, vLLM leaves one core to the API server. On two cores, that is half of the machine.
    """
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}


def with_prefix_caching(base: Workload, engine: Engine, policy: Policy) -> Point:
    """A point at which requests share images, and the engine their blocks."""
    shared = replace(base, questions=4)
    return Point(
        "prefix caching", "4 questions an image", shared, replace(engine, prefix_caching=True), (policy,)
    )


def small() -> Setup:
    """The setup for two CPU cores: a quarter of LLaVA-1.5's lengths, and KV memory for about six requests."""
    model, half = QUARTER, Policy.withdraw_at(8, QUARTER.layers)
    base = Workload(requests=16, text=8, output=32)
    engine = Engine(kv_mib=168)
    few = replace(base, requests=8)
    return Setup(
        model,
        (*CPU_OPTIONS, "--max-model-len=512", limit(model)),
        CPU_SLO,
        (
            Point("K", "of 16", base, engine, (half, Policy.withdraw_at(12, model.layers))),
            *vary("output tokens", base, engine, half, "output", {4: {}, 64: {}, 128: {"requests": 8}}),
            *vary("words of text", few, engine, half, "text", {256: {}}),
            *vary("images a request", few, engine, half, "images", {2: {}}),
            *vary("requests at once", base, engine, half, "concurrency", {1: {"requests": 4}, 4: {}}),
            Point("KV memory", "enough for all", base, Engine(1 * GIB), (half,)),
            with_prefix_caching(base, engine, half),
        ),
        resident=True,
        asynchronous=False,
        env=cpu_env(),
    )


def small_qwen() -> Setup:
    """The setup for two CPU cores with images of two sizes, and KV memory for about six requests of each."""
    half = Policy.withdraw_at(8, SMALL_QWEN.layers)
    base = Workload(requests=16, text=8, output=32)
    points = [
        Point(
            "visual tokens an image",
            f"{side**2:,}",
            replace(base, image_side=side),
            Engine(kv_mib=kv_mib),
            (half,),
        )
        for side, kv_mib in ((16, 60), (32, 208))
    ]
    return Setup(
        SMALL_QWEN,
        (*CPU_OPTIONS, "--max-model-len=1280", limit(SMALL_QWEN)),
        CPU_SLO,
        tuple(points),
        resident=True,
        asynchronous=False,
        env=cpu_env(),
    )


def schedule() -> Setup:
    """The setup `small` with other policies: a ranked schedule, and VTW at no more of the decoder's work."""
    setup = small()
    k, *_ = setup.points
    policies = published_beside_vtw(setup.model, k.workload)
    return replace(setup, points=(replace(k, sweep="schedule", value="", policies=policies),))


def rankings() -> Setup:
    """The setup `small` with policies that answer about as many questions as VTW with K = 7 of 12 layers.

    Of the trained model's tasks, the mean is 59% for VTW and FastV, and 56% for `diversity`, as
    `benchmarks/results/quality.md` and `rankings.md` say. K is at the same part of this model's depth.
    """
    setup = small()
    k, *_ = setup.points
    policies = (
        Policy.withdraw_at(9, setup.model.layers),
        Policy((Stage(2, 0.28125),)),
        Policy((Stage(0, 0.40625),), ranked_by="diversity"),
    )
    return replace(setup, points=(replace(k, sweep="schedule", value="", policies=policies),))


GPU_OPTIONS = (
    "--load-format=dummy",
    "--dtype=bfloat16",
    "--max-num-seqs=1024",
    "--max-num-batched-tokens=8192",
)
GPU_SLO = {"ttft": 5_000, "tpot": 50}
GPU_BASE = Workload(requests=256, text=56, output=128)
WEIGHTS = {LLAVA_7B: 14.1, QWEN2_5_VL_7B: 16.6, QWEN3_VL_8B: 17.5, QWEN3_VL_30B_A3B: 62.1}
"""The gigabytes of a model's weights in bfloat16."""
CARDS = {24: 256, 40: 512, 80: 1024}
"""By the gigabytes of a GPU's memory: the number of requests that it gets."""


def kv_gib(card: int, model: Model) -> float:
    """The GiB of KV cache on a GPU: 0.9 of its memory, less the weights and 1.5 GB of working memory.

    Args:
        card: The gigabytes of the GPU's memory.
        model: A model of `WEIGHTS`.
    """
    return round((0.9 * card - WEIGHTS[model] - 1.5) * 1e9 / 2**30, 1)


def on_gpu(model: Model, points: Sequence[Point]) -> Setup:
    """A setup for one GPU."""
    options = (*GPU_OPTIONS, f"--max-model-len={model.max_positions}", limit(model))
    return Setup(model, options, GPU_SLO, tuple(points))


def cards(model: Model) -> Setup:
    """The setup for a model on one GPU, with the KV memory that GPUs of several sizes have."""
    half = Policy.withdraw_at(model.layers // 2, model.layers)
    points = [
        Point(
            "KV memory",
            f"{card} GB card",
            replace(GPU_BASE, requests=requests),
            Engine(int(kv_gib(card, model) * GIB)),
            (half,),
        )
        for card, requests in CARDS.items()
        if kv_gib(card, model) > 0
    ]
    whole = Point("KV memory", "whole card", replace(GPU_BASE, requests=1536), Engine(None), (half,))
    return on_gpu(model, [*points, whole])


def full(model: Model) -> Setup:
    """The setup for a model on one GPU, in which one thing is varied at a time.

    The published schedule is LLaVA-1.5's, whose images all have the same number of visual tokens.
    """
    layers = model.layers
    base, engine, half = GPU_BASE, Engine(8 * GIB), Policy.withdraw_at(layers // 2, layers)
    quarters = tuple(Policy.withdraw_at(part * layers // 4, layers) for part in (1, 2, 3))
    memory = {8: 256, 16: 512, 24: 512, 40: 1024, 80: 1536}
    if model is LLAVA_7B:
        own = [Point("schedule", "", base, engine, published_beside_vtw(model, base))]
    else:
        sides = {side: replace(base, image_side=side) for side in (16, 24)}
        name = "visual tokens an image"
        own = [Point(name, f"{side**2:,}", workload, engine, (half,)) for side, workload in sides.items()]
    return on_gpu(
        model,
        (
            Point("K", f"of {layers}", base, engine, quarters),
            *own,
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
            with_prefix_caching(base, engine, half),
        ),
    )


OF_QWEN = {
    "qwen2.5-vl-7b": QWEN2_5_VL_7B,
    "qwen3-vl-8b": QWEN3_VL_8B,
    "qwen3-vl-30b-a3b": QWEN3_VL_30B_A3B,
}
ON_GPU: dict[str, Callable[[], Setup]] = {
    **{"cards": partial(cards, LLAVA_7B), "full": partial(full, LLAVA_7B)},
    **{f"cards-{name}": partial(cards, model) for name, model in OF_QWEN.items()},
    **{f"full-{name}": partial(full, model) for name, model in OF_QWEN.items()},
}
ON_CPU: dict[str, Callable[[], Setup]] = {
    **{"small": small, "small-qwen": small_qwen},
    **{"schedule": schedule, "rankings": rankings},
}
SETUPS = ON_CPU | ON_GPU
