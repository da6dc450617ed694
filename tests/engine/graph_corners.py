# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The way of a CUDA machine, on the stand-ins of `static_graphs`: run by `test_runner_v2.py`."""

import importlib

import pytest
from vllm import SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.forward_context import get_forward_context
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from benchmarks.small_llava import SmallLlava
from tests.engine import static_graphs
from tests.engine.adapters import Adapter
from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    SHAPES,
    assert_follows,
    free_blocks,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.gates import ASKED, assert_gated, dividing
from tests.engine.reference import Reference
from tests.engine.test_image_rankings import assert_selected, policy
from tests.engine.test_ranked import assert_ranked, written
from vllm_vtw.models.graph_inputs import GraphInputs

# Stage 0 is a group of four layers with one page a block and one of a layer with four pages. The blocks of
# stage 1, of two layers, have two pages.
LAYERS, LAYER = 7, 5
MODEL = SmallLlava(layers=LAYERS)
ONE_STEP = [ask for ask in ASKED if ask.name != "several apart"]
"""Those that gates decide about in a step of 240 tokens."""
ENGINE = {"enforce_eager": False, "max_num_batched_tokens": 128, "max_num_seqs": 8}
NGRAM = {"num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.getbasetemp() / "cache"))
    static_graphs.replays.clear()
    static_graphs.captures.clear()


def answer(checkpoint, reference, align=False, params=GREEDY, **options):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    with running(folder, {"layer": LAYER, "align": align}, **(ENGINE | options)) as llm:
        is_async = isinstance(scheduler_of(llm), AsyncScheduler)
        assert is_async == options.get("async_scheduling", True)
        all_free = free_blocks(llm)
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], params, use_tqdm=False)
        assert free_blocks(llm) == all_free
    for ask, output in zip(SHAPES, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert len(ids) == params.max_tokens
        align_to = BLOCK_SIZE if align else 1
        assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, align_to)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, int]]:
    """Token counts of the graphs that later segments took, each with the token count of the whole batch."""
    sizes, original = [], GraphInputs.write

    def write(self, size, *inputs):
        sizes.append((size, get_forward_context().batch_descriptor.num_tokens))
        return original(self, size, *inputs)

    monkeypatch.setattr(GraphInputs, "write", write)
    return sizes


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_graphs_are_replayed(checkpoint, reference, taken, align, async_scheduling):
    answer(checkpoint, reference, align, async_scheduling=async_scheduling)
    # Layers are cut at attention: one piece more than layers, in each of the two segments.
    pieces = LAYERS + 2
    captured = {("PIECEWISE", size): pieces for size in static_graphs.SIZES}
    assert static_graphs.captures == captured | {("FULL", 8): 1}
    assert static_graphs.replays["FULL", 8] >= GREEDY.max_tokens
    assert any(mode == "PIECEWISE" for mode, _ in static_graphs.replays)
    # Some batches had a graph of more tokens, or were too large for one.
    assert any(size < batch for size, batch in taken)
    assert any(size == batch for size, batch in taken)


def test_ranked_prompts_choose_between_graphs(checkpoint, reference, taken, tmp_path):
    schedule = {1: 0.6, 3: 0.05}
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asks = [ask for ask in SHAPES if ask.name in ("no image", "one in the middle", "first", "nothing else")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = ENGINE | {"max_num_batched_tokens": 160}
    with running(folder, written(tmp_path, schedule, MODEL), **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in asks], params, use_tqdm=False)
    for ask, output in zip(asks, outputs, strict=True):
        assert_ranked(oracle, ask, output, schedule)
    assert static_graphs.replays["FULL", 8] > 0
    # What stays of a prompt may have a graph where the prompt has none.
    assert any(size < batch for size, batch in taken)


def test_a_stage_before_the_decoder_has_graphs(checkpoint, reference, taken):
    """Its segment begins with layer 0, which gets no residual."""
    schedule, folder = {0: 0.5, 4: 0.1}, checkpoint(MODEL)
    oracle = reference(folder)
    with running(folder, policy(schedule, "uniform", MODEL), **ENGINE) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
    for ask, output in zip(SHAPES, outputs, strict=True):
        assert_selected(oracle, ask, output, schedule, "uniform", [""] * len(ask.images))
    assert static_graphs.replays["FULL", 8] > 0
    assert any(size < batch for size, batch in taken)


def test_gates_decide_between_graphs(checkpoint, reference, taken, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, ONE_STEP, MODEL, layers=(1, 3))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = ENGINE | {"max_num_batched_tokens": 240}
    with running(folder, gates.options, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ONE_STEP], params, use_tqdm=False)
    exits = [assert_gated(oracle, *told, gates, MODEL) for told in zip(ONE_STEP, outputs, strict=True)]
    assert set(exits) == {1, 3, LAYERS}
    assert static_graphs.replays["FULL", 8] > 0
    # What stays of a prompt may have a graph where the prompt has none.
    assert any(size < batch for size, batch in taken)


def test_requests_choose_between_graphs(checkpoint, reference, taken):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, (1, 3, LAYERS)[number % 3]) for number, ask in enumerate(SHAPES)]
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args={"vtw_layer": layer})
        for _, layer in asked
    ]
    vtw = {"layers": [1, 3], "align": False, "guard": {"share": 1}}
    with running(folder, vtw, **ENGINE) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask, _ in asked], params, use_tqdm=False)
        step_until(llm, lambda: not scheduler_of(llm).has_requests())
        counts = scheduler_of(llm).statistics.take()
    for (ask, layer), output in zip(asked, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, ids, layer, align_to=1)
    assert {"guard_requests/1/", "guard_requests/3/"} <= counts.keys()
    assert static_graphs.replays["FULL", 8] > 0
    assert any(size < batch for size, batch in taken)


def test_graphs_of_mixed_batches_become_piecewise(checkpoint, reference, taken):
    answer(checkpoint, reference, compilation_config={"cudagraph_mode": "FULL"})
    assert static_graphs.replays["FULL", 8] >= GREEDY.max_tokens
    assert any(size < batch for size, batch in taken)


def test_a_second_start_compiles_nothing(checkpoint, reference):
    answer(checkpoint, reference)
    before = compilation_counter.clone()
    answer(checkpoint, reference)
    assert compilation_counter.num_aot_artifacts_loaded - before.num_aot_artifacts_loaded == 2
    assert compilation_counter.num_aot_compiles == before.num_aot_compiles
    assert compilation_counter.num_inductor_compiles == before.num_inductor_compiles


def test_chunks_of_one_token_run_as_decodes(checkpoint, reference):
    """Pictures come in one token at a time, with the decodes of others, in graphs of the whole model."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answer(checkpoint, reference, params=params, long_prefill_token_threshold=1)
    assert static_graphs.replays["FULL", 8] > 200


@pytest.mark.parametrize(("method", "async_scheduling"), [("ngram", False), ("ngram_gpu", True)])
def test_ngram_speculation(checkpoint, reference, method, async_scheduling):
    speculative = NGRAM | {"method": method}
    answer(checkpoint, reference, async_scheduling=async_scheduling, speculative_config=speculative)
    assert static_graphs.replays["FULL", 32] > 0


@pytest.mark.parametrize(("method", "async_scheduling"), [("ngram", False), ("ngram_gpu", True)])
def test_gates_with_ngram_speculation(checkpoint, reference, tmp_path, method, async_scheduling):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, ONE_STEP, MODEL, layers=(1, 3))
    options = ENGINE | {"max_num_batched_tokens": 240, "async_scheduling": async_scheduling}
    options["speculative_config"] = NGRAM | {"method": method}
    with running(folder, gates.options, **options) as llm:
        all_free = free_blocks(llm)
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ONE_STEP], GREEDY, use_tqdm=False)
        assert free_blocks(llm) == all_free
    for told in zip(ONE_STEP, outputs, strict=True):
        assert_gated(oracle, *told, gates, MODEL)


def test_adapters_of_a_stage_in_its_graphs(checkpoint, reference, taken, tmp_path):
    importlib.import_module("tests.engine.lora_kernels")
    folder = checkpoint(MODEL)
    choices: list[tuple[LoRARequest | None, Reference]] = [(None, reference(folder))]
    for seed in (1, 2):
        adapter = Adapter(reference(folder), seed)
        path = adapter.save(tmp_path / str(seed))
        choices.append((LoRARequest(f"adapter-{seed}", seed, str(path)), adapter.merged(folder)))
    asked = [(ask, *choices[number % 3]) for number, ask in enumerate(SHAPES)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = ENGINE | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with running(folder, {"layer": LAYER, "align": False}, **options) as llm:
        prompts = [ask.to_vllm(oracle) for ask, _, oracle in asked]
        adapters = [request for _, request, _ in asked]
        outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    for (ask, _, oracle), output in zip(asked, outputs, strict=True):
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, LAYER, align_to=1)
    assert static_graphs.replays["FULL", 8] > 0
    assert any(size < batch for size, batch in taken)
    assert any(size == batch for size, batch in taken)
