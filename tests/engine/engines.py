# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Engines, requests and checks that the engine tests share."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from benchmarks.small_llava import PATCH_SIZE, SmallLlava
from tests.engine.reference import Reference

BLOCK_SIZE = 32
MODEL = SmallLlava()
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


@contextmanager
def running(folder: Path, vtw: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """An engine in this process: stock vLLM, or with the plugin where `vtw` gives its options."""
    if vtw is not None:
        options |= {"model_impl": "vtw", "additional_config": {"vtw": vtw}}
    defaults = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {"image": 8},
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    llm = LLM(model=str(folder), **(defaults | options))
    try:
        assert_runner(llm)
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def assert_runner(llm: LLM) -> None:
    """The engine's model runner is the one that the environment asks for. V2 has to run in this process."""
    asked_for_v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    driver = getattr(getattr(core, "model_executor", None), "driver_worker", None)
    if asked_for_v2 or driver is not None:
        assert driver is not None
        assert isinstance(driver.worker.model_runner, RunnerV2 if asked_for_v2 else RunnerV1)


def scheduler_of(llm: LLM) -> Scheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def held_blocks(llm: LLM) -> dict[str, list[list[int]]]:
    """By request that holds any: the block ids of every KV-cache group."""
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    requests = {request_id for manager in managers for request_id in manager.req_to_blocks}
    return {
        request_id: [
            [block.block_id for block in manager.req_to_blocks.get(request_id, [])] for manager in managers
        ]
        for request_id in requests
    }


def picture(seed: int, side: int = MODEL.image_side) -> Image.Image:
    rng = np.random.default_rng(seed)
    size = side * PATCH_SIZE
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Ask:
    """A request: a prompt with one `<image>` for every picture."""

    name: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    as_embeds: bool = False

    def to_vllm(self, reference: Reference) -> dict[str, Any]:
        if not self.images:
            return {"prompt": self.prompt}
        if self.as_embeds:
            return {
                "prompt": self.prompt,
                "multi_modal_data": {"image": [reference.embeds(image) for image in self.images]},
            }
        return {"prompt": self.prompt, "multi_modal_data": {"image": list(self.images)}}


A, B, C = picture(1), picture(2), picture(3)
FILLER = "Some words that stand before the picture and fill a block or so. "
SHAPES = (
    Ask("no image", "USER: Tell me a story about nothing at all. ASSISTANT:"),
    Ask("one in the middle", "USER: <image>\nWhat is this? ASSISTANT:", (A,)),
    Ask("text before", f"USER: {FILLER}<image>\nWhat is this? ASSISTANT:", (A,)),
    Ask("several apart", "USER: <image>\nand <image>\nor <image> Which? ASSISTANT:", (A, B, C)),
    Ask("touching", "USER: <image><image>\nWhat differs? ASSISTANT:", (A, B)),
    Ask("first", "<image> What is this? ASSISTANT:", (B,)),
    Ask("last", f"{FILLER}What is this? <image>", (B,)),
    Ask("first and last", "<image> and <image>", (C, A)),
    Ask("nothing else", "<image>", (C,)),
    Ask("nothing but several", "<image><image>", (A, C)),
    Ask("embeddings", "USER: <image>\nWhat is this? ASSISTANT:", (B,), as_embeds=True),
)


def assert_follows(
    reference: Reference,
    ask: Ask,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    layer: int,
    align_to: int,
) -> None:
    """The answer is the reference's greedy one, token for token.

    One forward over prompt and answer shows it: where every token is the argmax after the tokens before it,
    a greedy search would have gone the same way.
    """
    token_ids = [*prompt_ids, *output_ids]
    embeds = [reference.embeds(image) for image in ask.images]
    dropped = reference.dropped(token_ids, len(prompt_ids), align_to)
    logits = reference.logits(token_ids, embeds, layer, dropped)
    expected = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    wrong = [i for i, token in enumerate(output_ids) if token != expected[i]]
    assert not wrong, f"{ask.name}: token {wrong[0]} is {output_ids[wrong[0]]}, not {expected[wrong[0]]}"


def worst_choice(
    reference: Reference, ask: Ask, prompt_ids: Sequence[int], output_ids: Sequence[int], layer: int
) -> float:
    """By how many logits the worst token of an answer falls short of the float32 reference's choice."""
    token_ids = [*prompt_ids, *output_ids]
    embeds = [reference.embeds(image) for image in ask.images]
    logits = reference.logits(token_ids, embeds, layer, reference.dropped(token_ids, len(prompt_ids), 1))
    answers = logits[len(prompt_ids) - 1 : -1]
    return float((answers.max(-1).values - answers[range(len(output_ids)), list(output_ids)]).max())


def step_until(llm: LLM, done: Callable[[], bool], each: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Steps the engine, calling `each` after every step, until `done`. The finished outputs, by request."""
    finished = {}
    while not done():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        each()
    return finished


def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=-1)
