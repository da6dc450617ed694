# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Several workers, in vLLM's own executor: tensor and pipeline parallelism on the CPU."""

import math

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.small_llava import SmallLlava
from tests.engine.adapters import Adapter
from tests.engine.engines import BLOCK_SIZE, SHAPES, assert_follows, logprobs_of, running
from tests.engine.gates import assert_gated, dividing
from tests.engine.test_image_rankings import assert_selected
from tests.engine.test_image_rankings import policy as by_image
from tests.engine.test_prefix_cache import ENGINE, Setting, serve
from tests.engine.test_ranked import assert_ranked, written
from tests.engine.test_ranked import policy as ranked
from vllm_vtw.models.decoder import StagedDecoder

LAYERS = 6
MODEL = SmallLlava(layers=LAYERS)
ASKS = [ask for ask in SHAPES if ask.name in ("no image", "text before", "several apart", "last")]
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
BRIEF = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# vLLM makes the buffers that a pipeline rank receives in when it warms up what it has compiled.
PIPELINE = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Workers share what cores there are; an engine of several steps in a process of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


def record_rows(worker) -> None:
    """In a worker: records how many tokens each of its segments computes."""
    worker.rows_computed = []
    original = StagedDecoder._run

    def run(self, stage, step, positions, hidden, residual):
        worker.rows_computed.append(len(hidden))
        return original(self, stage, step, positions, hidden, residual)

    StagedDecoder._run = run  # type: ignore[method-assign]


def rows_computed(worker) -> list[int]:
    return worker.rows_computed


@pytest.mark.slow
def test_the_second_rank_computes_retained_tokens_only(checkpoint, reference, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    ask = next(ask for ask in ASKS if ask.name == "several apart")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with running(folder, {"layer": 3, "align": False}, **PIPELINE) as llm:
        llm.collective_rpc(record_rows)
        prompt = llm.generate(ask.to_vllm(oracle), params, use_tqdm=False)[0].prompt_token_ids
        first, second = llm.collective_rpc(rows_computed)
    decodes = [1] * (params.max_tokens - 1)
    visual = sum(oracle.dropped(prompt, len(prompt), 1))
    assert first == [len(prompt), *decodes]
    assert second == [len(prompt) - visual, *decodes]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor", marks=pytest.mark.slow),
        pytest.param(PIPELINE, id="pipeline"),
    ],
)
def test_two_workers_and_requests_that_choose_their_layer(checkpoint, reference, options):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asked = [(ask, layer) for ask in ASKS for layer in (2, 5, LAYERS)]
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args={"vtw_layer": layer})
        for _, layer in asked
    ]
    vtw = {"layers": [2, 5], "align": True, "guard": {"share": 1}}
    options = options | {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True}
    with running(folder, vtw, **options) as llm:
        for _ in range(2):
            prompts = [ask.to_vllm(oracle) for ask, _ in asked]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for (ask, layer), output in zip(asked, outputs, strict=True):
                answer = output.outputs[0].token_ids
                assert_follows(oracle, ask, output.prompt_token_ids, answer, layer, BLOCK_SIZE)
    assert sum(output.num_cached_tokens for output in outputs) > 0


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        # At K = 5, blocks of the last layer hold five pages.
        pytest.param(5, {"tensor_parallel_size": 2}, id="tensor", marks=pytest.mark.slow),
        pytest.param(1, PIPELINE, id="pipeline, inside the first rank", marks=pytest.mark.slow),
        pytest.param(3, PIPELINE, id="pipeline, between the ranks", marks=pytest.mark.slow),
        pytest.param(5, PIPELINE, id="pipeline, inside the second rank", marks=pytest.mark.slow),
    ],
)
def test_answers_of_two_workers(checkpoint, reference, layer, options):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = options | {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    with running(folder, {"layer": layer, "align": False}, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ASKS], SHORT, use_tqdm=False)
    for ask, output in zip(ASKS, outputs, strict=True):
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        assert_follows(oracle, ask, prompt, answer, layer, align_to=1)
        embeds = [oracle.embeds(image) for image in ask.images]
        expected = logprobs_of(oracle.logits(prompt, embeds, layer, oracle.dropped(prompt, len(prompt), 1)))
        for position in range(1, len(prompt)):
            if prompt[position] != oracle.image_token:
                given = output.prompt_logprobs[position][prompt[position]].logprob
                assert math.isclose(given, expected[position - 1, prompt[position]], abs_tol=1e-3)


@pytest.mark.slow
def test_heads_on_two_workers_rank_alike(checkpoint, reference, tmp_path):
    schedule = {1: 0.6, 3: 0.2}
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 320, "max_num_seqs": 4}
    with running(folder, written(tmp_path, schedule, MODEL), **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ASKS], BRIEF, use_tqdm=False)
    for ask, output in zip(ASKS, outputs, strict=True):
        assert_ranked(oracle, ask, output, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("ranking", ["key-norm", "variation"])
def test_other_rankings_on_two_workers(checkpoint, reference, ranking):
    schedule, folder = {1: 0.6, 3: 0.2}, checkpoint(MODEL)
    oracle = reference(folder)
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 320, "max_num_seqs": 4}
    with running(folder, {"policy": ranked(schedule, MODEL, ranking)}, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ASKS], BRIEF, use_tqdm=False)
    for ask, output in zip(ASKS, outputs, strict=True):
        assert_ranked(oracle, ask, output, schedule, ranking)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [{0: 0.01}, {0: 0.5, 2: 0.2, 5: 0.0}])
@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, PIPELINE], ids=["tensor", "pipeline"])
def test_rankings_by_image_on_two_workers(checkpoint, reference, options, schedule):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = options | {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True}
    with running(folder, by_image(schedule, "uniform", MODEL), **options) as llm:
        prompts = [ask.to_vllm(oracle) for ask in ASKS]
        alone = [llm.generate(prompt, BRIEF, use_tqdm=False)[0] for prompt in prompts]
        for outputs in (alone, llm.generate(prompts, BRIEF, use_tqdm=False)):
            for ask, output in zip(ASKS, outputs, strict=True):
                assert_selected(oracle, ask, output, schedule, "uniform", [""] * len(ask.images))
    assert sum(output.num_cached_tokens for output in outputs) > 0


@pytest.mark.slow
def test_workers_are_told_which_tokens_stay(checkpoint, reference):
    folder, schedule = checkpoint(MODEL), {0: 0.5, 2: 0.2, 5: 0.0}
    oracle = reference(folder)
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with running(
        folder, by_image(schedule, "diversity", MODEL), **options, enable_prefix_caching=True
    ) as llm:
        prompts = [ask.to_vllm(oracle) for ask in ASKS]
        for _ in range(2):
            outputs = llm.generate(prompts, BRIEF, use_tqdm=False)
            for ask, output in zip(ASKS, outputs, strict=True):
                assert_selected(oracle, ask, output, schedule, "diversity", [])
    assert sum(output.num_cached_tokens for output in outputs) > 0


def test_gates_on_two_workers_decide_alike(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, model=MODEL, layers=(1, 3))
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 640, "max_num_seqs": 12}
    with running(folder, gates.options, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], BRIEF, use_tqdm=False)
    exits = [assert_gated(oracle, *told, gates, MODEL) for told in zip(SHAPES, outputs, strict=True)]
    assert set(exits) == {1, 3, LAYERS}


@pytest.mark.slow
def test_adapters_on_two_workers(checkpoint, reference, tmp_path):
    """All requests have one: vLLM's kernels for the CPU are wrong about rows without an adapter."""
    folder = checkpoint(MODEL)
    choices = []
    for seed in (1, 2):
        adapter = Adapter(reference(folder), seed)
        request = LoRARequest(f"adapter-{seed}", seed, str(adapter.save(tmp_path / str(seed))))
        choices.append((request, adapter.merged(folder)))
    asked = [(ask, *choices[number % 2]) for number, ask in enumerate(SHAPES)]
    options = {"tensor_parallel_size": 2, "enable_lora": True, "max_loras": 2, "max_num_batched_tokens": 96}
    with running(folder, {"layer": 4, "align": False}, **options) as llm:
        prompts = [ask.to_vllm(oracle) for ask, _, oracle in asked]
        adapters = [request for _, request, _ in asked]
        outputs = llm.generate(prompts, BRIEF, lora_request=adapters, use_tqdm=False)
    for (ask, _, oracle), output in zip(asked, outputs, strict=True):
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, 4, align_to=1)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [2, 4, 7])
def test_pipeline_ranks_hold_as_much_text_as_in_stock(checkpoint, layer):
    """Each rank has blocks of its own, so the deep layers' blocks take no memory of the first rank."""
    folder = checkpoint(SmallLlava())
    fits = []
    for vtw in (None, {"layer": layer}):
        with running(folder, vtw, **PIPELINE) as llm:
            fits.append(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    in_stock, with_plugin = fits
    assert with_plugin == pytest.approx(in_stock, rel=0.01)


@pytest.mark.slow
def test_pipeline_ranks_copy_their_own_blocks(checkpoint, reference):
    """At K = 7, one layer of each of two ranks has three pages a block, and hits end inside blocks."""
    folder = checkpoint(SmallLlava())
    setting = Setting(folder, reference(folder))
    course = setting.course[:12]
    with running(setting.folder, {"layer": 7, "align": True}, **ENGINE, **PIPELINE) as llm:
        served = [serve(llm, turn) for turn in course]
    assert [one.cached for one in served] == [
        one.cached for one in setting.in_stock(BLOCK_SIZE)[: len(course)]
    ]
    for one in served:
        one.assert_right(setting.oracle, BLOCK_SIZE, 7)
