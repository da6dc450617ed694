# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Gates that decide when a request's visual tokens leave, against the reference that has the same gates."""

import json
import sys
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from benchmarks.exits import by_number, logged_exits
from benchmarks.server import serving
from benchmarks.small_llava import SmallLlava
from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    MODEL,
    SHAPES,
    A,
    Ask,
    B,
    assert_follows,
    free_blocks,
    held_blocks,
    logprobs_of,
    running,
    scheduler_of,
    step_until,
)
from tests.engine.gates import ALWAYS, ASKED, LAYERS, NEVER, assert_gated, dividing, gated, random_gates


def test_every_request_shape(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    with running(folder, gates.options, max_num_batched_tokens=640) as llm, logged_exits() as logged:
        all_free = free_blocks(llm)
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        told = by_number(logged)
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert free_blocks(llm) == all_free
        assert not scheduler_of(llm).exits
    exits = {}
    for number, (ask, batched, single) in enumerate(zip(SHAPES, together, alone, strict=True)):
        assert len(batched.outputs[0].token_ids) == GREEDY.max_tokens
        assert batched.outputs[0].token_ids == single.outputs[0].token_ids, ask.name
        exits[number] = assert_gated(oracle, ask, batched, gates)
    assert set(exits.values()) == {*LAYERS, MODEL.layers}, "the requests did not divide"
    assert told == {number: exits[number] for number, ask in enumerate(SHAPES) if ask in ASKED}


def test_gates_over_blocks_of_several_pages(checkpoint, reference, tmp_path):
    """Blocks of every stage hold several pages in some layers."""
    model = SmallLlava(layers=12)
    folder = checkpoint(model)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle, model=model, layers=(3, 11))
    with running(folder, gates.options, max_num_batched_tokens=640) as llm:
        all_free = free_blocks(llm)
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
        assert free_blocks(llm) == all_free
    assert [group.kv_cache_spec.pages for group in groups] == [2, 1, 3, 6]
    exits = [assert_gated(oracle, *told, gates, model) for told in zip(SHAPES, outputs, strict=True)]
    assert set(exits) == {3, 11, 12}


@pytest.mark.parametrize(("threshold", "layer"), [(ALWAYS, LAYERS[0]), (NEVER, MODEL.layers)])
def test_forced_gates_are_vtw_and_stock(checkpoint, reference, tmp_path, threshold, layer):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = gated(tmp_path, random_gates(LAYERS), [threshold] * len(LAYERS))
    with running(folder, gates.options, max_num_batched_tokens=640) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
    for ask, output in zip(SHAPES, outputs, strict=True):
        prompt = output.prompt_token_ids
        exit_layer = layer if ask in ASKED else MODEL.layers
        assert_follows(oracle, ask, prompt, output.outputs[0].token_ids, exit_layer, align_to=1)


def test_blocks_are_those_of_the_stage_that_was_left(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    seen: dict[str, set[int]] = {}
    with running(folder, gates.options, max_num_batched_tokens=640) as llm:
        for number, ask in enumerate(SHAPES):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)
        assert isinstance(scheduler_of(llm), AsyncScheduler) == ("tests.engine.asynchronous" in sys.modules)
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        first_layers = [(0, *LAYERS)[getattr(group.kv_cache_spec, "stage", 0)] for group in groups]

        def check():
            held = held_blocks(llm)
            ids = [block for rows in held.values() for row in rows for block in row]
            assert len(ids) == len(set(ids)), "a block has two owners"
            for request in scheduler_of(llm).running:
                prompt, computed = request.num_prompt_tokens, request.num_computed_tokens
                # Of a step in flight nothing is known yet.
                if computed < prompt or (request.num_in_flight_tokens and computed == prompt):
                    continue
                ask = SHAPES[int(request.request_id.split("-")[0])]
                exit_layer = gates.exit_layer(oracle, ask, request.prompt_token_ids)
                visual = sum(oracle.dropped(request.prompt_token_ids, prompt, 1))
                for layer, row in zip(first_layers, held[request.request_id], strict=True):
                    retained = computed - (visual if layer >= exit_layer else 0)
                    assert len(row) == -(-retained // BLOCK_SIZE), (ask.name, layer, exit_layer)
                seen.setdefault(request.request_id, set()).add(computed - prompt)

        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), check)
        assert not held_blocks(llm)
    assert len(seen) == len(SHAPES)
    for request_id, after in seen.items():
        assert 0 in after or SHAPES[int(request_id.split("-")[0])] not in ASKED, "not looked at after prefill"


def test_a_resumed_request_keeps_its_decision(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    asks = [ask for ask in SHAPES if ask.name not in ("several apart", "embeddings")] * 2
    long = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    options = {
        "max_num_batched_tokens": 320,
        "num_gpu_blocks_override": 100,
        "max_model_len": 320,
    }
    preempted: set[str] = set()
    with running(folder, gates.options, **options) as llm, logged_exits() as logged:
        all_free = free_blocks(llm)
        for number, ask in enumerate(asks):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), long)

        def note():
            for request in scheduler_of(llm).running:
                if request.num_preemptions and request.request_id in logged:
                    preempted.add(request.request_id)

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note)
        assert free_blocks(llm) == all_free
    assert len(preempted) >= 2, "the pool was not small enough"
    left = {layer for number, layer in by_number(logged).items() if asks[number].images}
    assert len(left) > 1
    for number, ask in enumerate(asks):
        assert_gated(oracle, ask, outputs[str(number)], gates)


def test_prefixes_are_shared_up_to_the_picture(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    before = "Some words that stand before the picture and are longer than a step. " * 6
    asks = [
        Ask(f"{n}", f"{before}<image>\n{what} ASSISTANT:", (A,))
        for n, what in enumerate(("Who?", "Where is this?", "What?"))
    ]
    gates = dividing(tmp_path, oracle, asks, layers=LAYERS[:2])
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 128}
    with running(folder, gates.options, **options) as llm:
        outputs = [llm.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0] for ask in (*asks, asks[0])]
    first = outputs[0].prompt_token_ids.index(oracle.image_token)
    assert first > 128
    assert [output.num_cached_tokens for output in outputs] == [0, *[first // BLOCK_SIZE * BLOCK_SIZE] * 3]
    exits = [
        assert_gated(oracle, ask, one, gates) for ask, one in zip((*asks, asks[0]), outputs, strict=True)
    ]
    assert len(set(exits)) == 3


def test_several_answers_prompt_logprobs_and_a_cache_that_is_reset(checkpoint, reference, tmp_path):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    two = SamplingParams(n=2, temperature=1, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 640}
    with running(folder, gates.options, **options) as llm, logged_exits() as logged:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in ASKED], two, use_tqdm=False)
        before = len(logged)
        for number, ask in enumerate(ASKED):
            llm.llm_engine.add_request(f"{number}", ask.to_vllm(oracle), GREEDY)
        for _ in range(5):
            llm.llm_engine.step()
        assert len(logged) == before + len(ASKED)
        assert scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
        again = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())
    for number, ask in enumerate(ASKED):
        assert_gated(oracle, ask, again[str(number)], gates)
    for ask, output in zip(ASKED, outputs, strict=True):
        prompt, embeds = output.prompt_token_ids, [oracle.embeds(image) for image in ask.images]
        layer = gates.exit_layer(oracle, ask, prompt)

        def expected(token_ids: list[int], prompt=prompt, embeds=embeds, layer=layer) -> torch.Tensor:
            dropped = oracle.dropped(token_ids, len(prompt), 1)
            return logprobs_of(oracle.logits(token_ids, embeds, layer, dropped))

        for one in output.outputs:
            of_answer = expected([*prompt, *one.token_ids])[len(prompt) - 1 : -1]
            given = [next(iter(step.values())).logprob for step in one.logprobs]
            wanted = of_answer[range(len(one.token_ids)), list(one.token_ids)].tolist()
            assert given == pytest.approx(wanted, abs=1e-3)
        of_prompt = expected(list(prompt))
        for at in range(1, len(prompt)):
            if prompt[at] != oracle.image_token:
                given = output.prompt_logprobs[at][prompt[at]].logprob
                assert given == pytest.approx(float(of_prompt[at - 1, prompt[at]]), abs=1e-3)


@pytest.mark.parametrize("num_requests", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_nothing_leaks(checkpoint, reference, tmp_path, num_requests):
    """Requests that leave at random layers, are aborted, preempted, and share what stands before pictures."""
    random = Random(num_requests)
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    options = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 320,
        "max_num_seqs": 12,
        "num_gpu_blocks_override": 110,
        "max_model_len": 480,
    }
    finished = aborted = 0
    preempted: set[str] = set()

    def greedy(tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    with running(folder, gates.options, **options) as llm, logged_exits() as logged:
        engine, scheduler, all_free = llm.llm_engine, scheduler_of(llm), free_blocks(llm)
        alone = []
        for ask in SHAPES:
            output = llm.generate(ask.to_vllm(oracle), greedy(40), use_tqdm=False)[0]
            assert_gated(oracle, ask, output, gates)
            alone.append(output.outputs[0].token_ids)
        waiting = iter(range(1000, 1000 + num_requests))
        asked: dict[str, tuple[int, int]] = {}
        while asked or finished + aborted < num_requests:
            while len(asked) < 16 and random.random() < 0.7 and (number := next(waiting, None)) is not None:
                which, tokens = random.randrange(len(SHAPES)), random.randint(1, 40)
                asked[str(number)] = (which, tokens)
                engine.add_request(str(number), SHAPES[which].to_vllm(oracle), greedy(tokens))
            for output in engine.step():
                if output.finished and output.request_id in asked:
                    which, tokens = asked.pop(output.request_id)
                    assert output.outputs[0].token_ids == alone[which][:tokens], SHAPES[which].name
                    finished += 1
            preempted.update(request.request_id for request in scheduler.running if request.num_preemptions)
            if asked and random.random() < 0.05:
                victim = random.choice(sorted(asked))
                engine.abort_request([victim])
                del asked[victim]
                aborted += 1
        step_until(llm, lambda: not engine.has_unfinished_requests())
        assert free_blocks(llm) == all_free
        assert not scheduler.retentions
        assert not scheduler.exits
    assert set(logged.values()) == {*LAYERS, MODEL.layers}
    assert finished > num_requests * 0.7
    assert aborted > num_requests * 0.02
    assert len(preempted) > num_requests * 0.02


def test_a_gate_file_that_is_another(checkpoint, tmp_path):
    gates = gated(tmp_path, random_gates(LAYERS), [0, 0, 0])
    options = gates.options
    save_file({"1.0.weight": torch.zeros(1)}, tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match="are not those of the policy"), running(checkpoint(MODEL), options):
        pytest.fail("the engine started")
    (tmp_path / "gates.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"), running(checkpoint(MODEL), options):
        pytest.fail("the engine started")


@pytest.mark.slow
def test_a_server_counts_exits(checkpoint, reference, tmp_path):
    from openai import BadRequestError, OpenAI

    from tests.engine.test_server import OPTIONS, chat

    gates = gated(tmp_path, random_gates(LAYERS), [NEVER, ALWAYS, NEVER])
    vtw = json.dumps({"vtw": gates.options})
    options = [*OPTIONS, "--max-num-batched-tokens=160", f"--additional-config={vtw}"]
    with serving(checkpoint(MODEL), *options) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        assert chat(client, A).choices[0].token_ids
        with pytest.raises(BadRequestError, match="raise --max-num-batched-tokens to 2"):
            chat(client, B, A)
        assert chat(client, B).choices[0].token_ids
        found = server.metrics()
        assert found["vllm:vtw_exit_layer_count"] == 2
        assert found["vllm:vtw_exit_layer_sum"] == 2 * LAYERS[1]
        assert "every visual token at the layer that gates choose, one of 2, 4, 6" in server.log()
