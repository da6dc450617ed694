# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""KV blocks through the engine: what requests hold, get back and share; who is let in."""

import functools
import json
import logging

import pytest
from vllm import SamplingParams

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    MODEL,
    SHAPES,
    A,
    Ask,
    assert_follows,
    free_blocks,
    held_blocks,
    picture,
    running,
    scheduler_of,
    step_until,
)

LAYER = MODEL.layers // 2


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


@pytest.mark.parametrize("align", [False, True])
def test_every_stage_holds_what_it_retains_after_every_step(checkpoint, reference, align):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    seen = set()
    with running(folder, {"layer": LAYER, "align": align}, max_num_batched_tokens=48) as llm:
        for number, ask in enumerate(SHAPES):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), GREEDY)

        def check():
            held = held_blocks(llm)
            ids = [block for groups in held.values() for group in groups for block in group]
            assert len(ids) == len(set(ids)), "a block has two owners"
            for request in scheduler_of(llm).running:
                tokens = list(request.all_token_ids)
                dropped = oracle.dropped(tokens, request.num_prompt_tokens, BLOCK_SIZE if align else 1)
                # A step's blocks are allocated before it runs, so they cover what is computed by now.
                computed = request.num_computed_tokens
                retained = computed - sum(dropped[:computed])
                assert [len(group) for group in held[request.request_id]] == [
                    blocks(computed),
                    blocks(retained),
                ]
                seen.add((request.request_id, computed < request.num_prompt_tokens))

        step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), check)
        assert not held_blocks(llm)
    # Each was looked at in decode, and all but the text in the middle of its prompt.
    assert len({request for request, prefilling in seen if not prefilling}) == len(SHAPES)
    assert len({request for request, prefilling in seen if prefilling}) >= len(SHAPES) - 1


@pytest.mark.parametrize("align", [False, True])
def test_preempted_requests_resume_with_the_same_answers(checkpoint, reference, align):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asks = [ask for ask in SHAPES if ask.name != "several apart"]
    options = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 22, "max_model_len": 320}
    resumed: set[tuple[str, bool]] = set()
    with running(folder, {"layer": LAYER, "align": align}, **options) as llm:
        all_free = free_blocks(llm)
        long = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
        for number, ask in enumerate(asks):
            llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), long)

        def note_resumed():
            for request in scheduler_of(llm).running:
                if request.num_preemptions:
                    resumed.add((request.request_id, request.num_output_tokens > 0))

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), note_resumed)
        assert free_blocks(llm) == all_free
    assert sum(in_answer for _, in_answer in resumed) >= 2, "the pool was not small enough"
    for number, ask in enumerate(asks):
        output = outputs[str(number)]
        ids = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, BLOCK_SIZE if align else 1)


@pytest.mark.parametrize("align", [False, True])
def test_aborts_at_any_point_free_everything_and_disturb_nobody(checkpoint, reference, align):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    with running(folder, {"layer": LAYER, "align": align}, max_num_batched_tokens=48) as llm:
        all_free = free_blocks(llm)
        engine = llm.llm_engine
        for steps in (0, 1, 2, 3, 5, 8, 13, 21, 34):
            for number, ask in enumerate(SHAPES):
                engine.add_request(f"{steps}-{number}", ask.to_vllm(oracle), GREEDY)
            countdown = iter([False] * steps)
            outputs = step_until(llm, functools.partial(next, countdown, True))
            aborted = [f"{steps}-{number}" for number in range(0, len(SHAPES), 2)]
            engine.abort_request(aborted)
            outputs |= step_until(llm, lambda: not engine.has_unfinished_requests())
            assert free_blocks(llm) == all_free
            assert not scheduler_of(llm).retentions
            for number, ask in enumerate(SHAPES):
                output = outputs.get(f"{steps}-{number}")
                if f"{steps}-{number}" in aborted and output is None:
                    continue
                assert output is not None
                ids = output.outputs[0].token_ids
                align_to = BLOCK_SIZE if align else 1
                assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, align_to)


def test_capacity_at_half_the_layers(checkpoint, reference):
    """LLaVA-1.5's lengths in equal KV memory: 576 visual, 64 text and 128 output tokens."""
    visual, text, output = 576, 64, 128
    model = SmallLlava(layers=4, image_side=24)
    folder = checkpoint(model)
    oracle = reference(folder)
    ask = Ask("", "<image>" + "x" * text, (picture(5, 24),))
    answer = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    bytes_per_token = model.layers * model.kv_heads * (model.hidden // model.heads) * 2 * 4
    memory = 20 * (visual + text + output) * bytes_per_token

    def peak(vtw: dict | None) -> int:
        most = 0
        # One step takes every prompt, so that the answers grow side by side and reach full length together.
        options = {"kv_cache_memory_bytes": memory, "max_num_seqs": 64, "max_num_batched_tokens": 1 << 15}
        with running(folder, vtw, **options) as llm:
            for number in range(48):
                llm.llm_engine.add_request(str(number), ask.to_vllm(oracle), answer)

            def count_complete():
                nonlocal most
                lengths = [request.num_tokens for request in scheduler_of(llm).running]
                most = max(most, sum(length == visual + text + output - 1 for length in lengths))

            outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), count_complete)
        assert {len(o.prompt_token_ids) for o in outputs.values()} == {visual + text}
        return most

    stock, ours = peak(None), peak({"layer": 2, "align": False})
    limit = 2 * (visual + text + output) / ((visual + text + output) + (text + output))
    assert ours / stock >= 0.95 * limit, (ours, stock, limit)


def test_several_stages(checkpoint, reference, tmp_path):
    """A schedule of three stages, the last two of which hold the same: borders alone change nothing."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    policy = {
        "format": "vllm-vtw-policy/1",
        "model": {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden},
        "stages": [{"layer": 3, "keep": 0.0}, {"layer": 6, "keep": 0.0}],
        "ranking": None,
        "gate": None,
        "layer": 3,
    }
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy))
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    with running(folder, {"policy": str(file)}, max_num_batched_tokens=64) as llm:
        assert len(scheduler_of(llm).withdrawal_policy.stages) == 2
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for ask, output in zip(SHAPES, outputs, strict=True):
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, 3, align_to=1)


def test_a_request_id_may_be_used_again(checkpoint, reference):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asks = [Ask("picture first", "<image> What? ASSISTANT:", (A,)), SHAPES[2], SHAPES[0], SHAPES[3]]
    with running(folder, {"layer": LAYER}) as llm:
        for ask in asks:
            llm.llm_engine.add_request("again", ask.to_vllm(oracle), GREEDY)
            output = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests())["again"]
            ids = output.outputs[0].token_ids
            assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, align_to=1)


@pytest.mark.parametrize(
    ("layer", "align", "block_size", "warned"),
    [
        (LAYER, True, 32, ""),
        (LAYER, True, 128, 'set "align": false'),
        (MODEL.layers - 1, False, 64, "that it takes in stock vLLM: use a smaller --block-size"),
    ],
)
def test_blocks_too_large_for_the_pictures_are_warned_of(
    checkpoint, caplog, layer, align, block_size, warned
):
    logging.getLogger("vllm.vtw").addHandler(caplog.handler)
    with running(checkpoint(MODEL), {"layer": layer, "align": align}, block_size=block_size):
        logged = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    logging.getLogger("vllm.vtw").removeHandler(caplog.handler)
    warnings = {line for line in logged if "KV blocks of" in line}
    assert len(warnings) == bool(warned)
    assert all(warned in warning for warning in warnings)
