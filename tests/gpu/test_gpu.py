# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The corners of the CPU tests on a GPU: CUDA graphs, both attention backends, both model runners.

In float32 answers equal the transformers reference. In bfloat16 they equal those of the same engine run
eagerly, and stay near the reference's.
"""

import collections
from dataclasses import replace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

from benchmarks.small_llava import TEXT_CONFIGS, SmallLlava
from tests.engine.engines import (
    GREEDY,
    SHAPES,
    assert_follows,
    free_blocks,
    running,
    scheduler_of,
    step_until,
    worst_choice,
)
from tests.engine.gates import assert_gated, dividing

BLOCK_SIZE = 16
# FlashAttention takes heads of 64.
MODEL = SmallLlava(layers=4, hidden=256, heads=4, kv_heads=2)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
# What the CPU tests allow: there, a wrong layer costs an answer 0.7 logits.
BFLOAT16_MARGIN = 0.1


@pytest.fixture(params=["1", "0"], ids=["V2", "V1"], autouse=True)
def runner(request, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", request.param)


@pytest.fixture
def replays(monkeypatch) -> collections.Counter:
    """How many CUDA graphs were replayed, by mode."""
    counts: collections.Counter = collections.Counter()
    original = torch.cuda.CUDAGraph.replay

    def replay(graph):
        in_forward = is_forward_context_available()
        mode = get_forward_context().cudagraph_runtime_mode if in_forward else CUDAGraphMode.FULL
        counts[mode.name] += 1
        return original(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return counts


def answers(folder, oracle, backend, dtype, layer=2, align=False, **options):
    defaults = {
        "dtype": dtype,
        "block_size": BLOCK_SIZE,
        "attention_backend": backend,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 256 << 20,
    }
    with running(folder, {"layer": layer, "align": align}, **(defaults | options)) as llm:
        all_free = free_blocks(llm)
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
        assert free_blocks(llm) == all_free
    return outputs


@pytest.mark.parametrize("backbone", TEXT_CONFIGS)
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_float32_is_the_reference(checkpoint, reference, replays, backbone, align, enforce_eager, layer):
    """On Triton attention, as FlashAttention takes no float32. Layer 1 of 4 makes three groups of a stage."""
    folder = checkpoint(replace(MODEL, backbone=backbone))
    oracle = reference(folder)
    outputs = answers(folder, oracle, "TRITON_ATTN", "float32", layer, align, enforce_eager=enforce_eager)
    assert bool(replays["FULL"]) == bool(replays["PIECEWISE"]) == (not enforce_eager)
    for ask, output in zip(SHAPES, outputs, strict=True):
        ids = output.outputs[0].token_ids
        align_to = BLOCK_SIZE if align else 1
        assert_follows(oracle, ask, output.prompt_token_ids, ids, layer, align_to)


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_bfloat16_in_graphs_is_eager(checkpoint, reference, replays, backend, async_scheduling, layer):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    # Without the compiler, which rounds elsewhere, what is left is the graphs.
    compiled_as_eager = {"mode": 3, "backend": "eager", "cudagraph_mode": "FULL_AND_PIECEWISE"}
    options = {"async_scheduling": async_scheduling}
    eager = answers(folder, oracle, backend, "bfloat16", layer, enforce_eager=True, **options)
    assert not replays
    graphs = answers(
        folder,
        oracle,
        backend,
        "bfloat16",
        layer,
        enforce_eager=False,
        compilation_config=compiled_as_eager,
        **options,
    )
    assert replays["FULL"] > GREEDY.max_tokens
    assert replays["PIECEWISE"] > 0
    for ask, one, other in zip(SHAPES, eager, graphs, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids, ask.name
        told = (oracle, ask, one.prompt_token_ids, one.outputs[0].token_ids)
        assert worst_choice(*told, layer) < BFLOAT16_MARGIN, ask.name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"compilation_config": {"cudagraph_mode": "FULL"}}, id="FULL for all"),
        pytest.param({"long_prefill_token_threshold": 1}, id="chunks of one token"),
        pytest.param({"speculative_config": NGRAM}, id="n-gram"),
        pytest.param(
            {"speculative_config": NGRAM, "long_prefill_token_threshold": 4}, id="chunks as long as a draft"
        ),
    ],
)
def test_float32_in_graphs_is_the_reference(checkpoint, reference, replays, options):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    outputs = answers(folder, oracle, "TRITON_ATTN", "float32", enforce_eager=False, **options)
    for ask, output in zip(SHAPES, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, ids, layer=2, align_to=1)
    assert replays


@pytest.mark.parametrize("kv_memory", [256 << 20, None])
def test_gates_decide_between_graphs(checkpoint, reference, replays, tmp_path, kv_memory):
    """Without a given memory, vLLM makes metadata builders once to measure graphs, and then anew."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, model=MODEL, layers=(1, 3))
    options = {
        "block_size": BLOCK_SIZE,
        "attention_backend": "TRITON_ATTN",
        "max_num_batched_tokens": 640,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": kv_memory,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": False,
    }
    with running(folder, gates.options, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
    exits = [assert_gated(oracle, *told, gates, MODEL) for told in zip(SHAPES, outputs, strict=True)]
    assert set(exits) == {1, 3, MODEL.layers}
    assert replays["FULL"]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_requests_choose_between_graphs_and_a_guard_reads_them(
    checkpoint, reference, replays, async_scheduling
):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, (1, 3, MODEL.layers)[number % 3]) for number, ask in enumerate(SHAPES)]
    params = [GREEDY.clone() for _ in asked]
    for one, (_, layer) in zip(params, asked, strict=True):
        one.extra_args = {"vtw_layer": layer}
    options = {
        "block_size": BLOCK_SIZE,
        "attention_backend": "TRITON_ATTN",
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": False,
        "async_scheduling": async_scheduling,
    }
    vtw = {"layers": [1, 3], "align": False, "guard": {"share": 1}}
    with running(folder, vtw, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask, _ in asked], params, use_tqdm=False)
        step_until(llm, lambda: not scheduler_of(llm).has_requests())
        counts = scheduler_of(llm).statistics.take()
    for (ask, layer), output in zip(asked, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, ids, layer, align_to=1)
    assert {"guard_requests/1/", "guard_requests/3/"} <= counts.keys()
    assert replays["FULL"]


@pytest.mark.parametrize("level", [1, 2])
def test_gates_and_graphs_outlast_a_sleep(checkpoint, reference, tmp_path, level):
    """At level 2 weights are dropped and loaded again. Gates and the inputs of graphs are kept."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, model=MODEL, layers=(1, 2))
    options = {
        "enforce_eager": False,
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 640,
        "enable_sleep_mode": True,
    }
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    with running(folder, gates.options, **options) as llm:
        before = llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.sleep(level)
        if level == 2:
            llm.wake_up(["weights"])
            llm.collective_rpc("reload_weights")
        llm.wake_up()
        after = llm.generate(prompts, GREEDY, use_tqdm=False)
    for ask, one, other in zip(SHAPES, before, after, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert_gated(oracle, ask, other, gates, MODEL)
