# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a request may ask for beside its answer, on one engine with a chunk border inside every picture."""

import math

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from tests.engine.engines import (
    FILLER,
    GREEDY,
    MODEL,
    SHAPES,
    A,
    Ask,
    assert_follows,
    free_blocks,
    logprobs_of,
    running,
    scheduler_of,
    step_until,
)

# Some blocks of stage 0 hold three pages.
LAYER = 5
PICTURES = [ask for ask in SHAPES if ask.images]


@pytest.fixture(scope="module")
def engine(checkpoint):
    options = {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "max_logprobs": 5}
    with running(checkpoint(MODEL), {"layer": LAYER, "align": False}, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(checkpoint, reference):
    return reference(checkpoint(MODEL))


def logits(oracle, ask, output, answer):
    token_ids = [*output.prompt_token_ids, *answer.token_ids]
    embeds = [oracle.embeds(image) for image in ask.images]
    dropped = oracle.dropped(token_ids, len(output.prompt_token_ids), 1)
    return oracle.logits(token_ids, embeds, LAYER, dropped)


@pytest.mark.parametrize("ask", SHAPES, ids=lambda ask: ask.name)
def test_logprobs(engine, oracle, ask):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    output = engine.generate(ask.to_vllm(oracle), params, use_tqdm=False)[0]
    answer = output.outputs[0]
    expected = logprobs_of(logits(oracle, ask, output, answer))
    prompt_length = len(output.prompt_token_ids)

    for step, logprobs in enumerate(answer.logprobs):
        row = expected[prompt_length - 1 + step]
        assert {token for token, _ in sorted(logprobs.items())} >= set(row.topk(3).indices.tolist())
        for token, logprob in logprobs.items():
            assert math.isclose(logprob.logprob, row[token], abs_tol=1e-4)

    texts = [i for i in range(1, prompt_length) if output.prompt_token_ids[i] != oracle.image_token]
    for position in texts:
        given = output.prompt_logprobs[position][output.prompt_token_ids[position]].logprob
        assert math.isclose(given, expected[position - 1, output.prompt_token_ids[position]], abs_tol=1e-4), (
            f"position {position} of {prompt_length}"
        )


def test_several_answers(engine, oracle):
    ask = PICTURES[0]
    params = SamplingParams(n=4, temperature=1.0, max_tokens=24, ignore_eos=True, logprobs=0)
    all_free = free_blocks(engine)
    output = engine.generate(ask.to_vllm(oracle), params, use_tqdm=False)[0]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    # A sampled answer has no greedy reference, but each of its tokens has a logprob where it stands.
    for answer in output.outputs:
        expected = logprobs_of(logits(oracle, ask, output, answer))[len(output.prompt_token_ids) - 1 :]
        given = torch.tensor([next(iter(step.values())).logprob for step in answer.logprobs])
        chosen = expected[torch.arange(len(answer.token_ids)), list(answer.token_ids)]
        assert torch.allclose(given, chosen, atol=1e-4)
    assert free_blocks(engine) == all_free


def test_stop_strings(engine, oracle):
    ask = PICTURES[0]
    whole = engine.generate(ask.to_vllm(oracle), GREEDY, use_tqdm=False)[0].outputs[0]
    tokenizer = engine.get_tokenizer()
    pieces = [tokenizer.decode([token]) for token in whole.token_ids]
    stop = next(piece for piece in pieces[5:] if piece.isascii() and piece not in pieces[:5])
    params = SamplingParams(temperature=0, max_tokens=32, stop=[stop])
    stopped = engine.generate(ask.to_vllm(oracle), params, use_tqdm=False)[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.text == whole.text[: whole.text.index(stop)]


def test_repeated_prompts_with_prefix_caching(engine, oracle):
    """Stage 0 could offer a hit that the other stages cannot serve: it must not be taken."""
    for _ in range(3):
        outputs = engine.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
        for ask, output in zip(SHAPES, outputs, strict=True):
            ids = output.outputs[0].token_ids
            assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, align_to=1)


def test_beam_search(engine, oracle):
    """Greedy's tokens, or a refusal where the prompt's last token would no longer be the last one."""
    for ask in SHAPES:
        if ask.as_embeds:
            continue
        prompt = ask.to_vllm(oracle)
        params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
        if ask.prompt.endswith("<image>"):
            with pytest.raises(ValueError, match="Beam search sends every generated token"):
                engine.beam_search([prompt], params)
            assert not scheduler_of(engine).requests
            continue
        found = engine.beam_search([prompt], params)[0].sequences[0].tokens[-6:]
        greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        assert found == engine.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids, ask.name


def test_a_seeded_request_whose_prompt_is_cut(engine, oracle):
    """It is cut inside the text and the picture. The second time the text is cached: the same draws."""
    seeded = SamplingParams(temperature=1, seed=7, max_tokens=12, ignore_eos=True)
    engine.reset_prefix_cache()
    ask = Ask("seeded", f"USER: {FILLER * 6}<image>\nWhat? ASSISTANT:", (A,))
    cut, cached = (engine.generate(ask.to_vllm(oracle), seeded, use_tqdm=False)[0] for _ in range(2))
    assert cut.num_cached_tokens == 0 < cached.num_cached_tokens
    assert cut.outputs[0].token_ids == cached.outputs[0].token_ids


def test_streaming_input_ends_with_an_error(engine, oracle, monkeypatch):
    """vLLM marks a request whose prompt comes in pieces as resumable."""
    scheduler = scheduler_of(engine)
    add = scheduler.add_request

    def add_resumable(request):
        request.resumable = True
        add(request)

    all_free = free_blocks(engine)
    monkeypatch.setattr(scheduler, "add_request", add_resumable)
    engine.llm_engine.add_request("session", PICTURES[0].to_vllm(oracle), GREEDY)
    monkeypatch.undo()
    outputs = step_until(engine, lambda: not engine.llm_engine.has_unfinished_requests())
    assert outputs["session"].outputs[0].finish_reason == "error"
    assert free_blocks(engine) == all_free
    assert not scheduler.retentions
    engine.generate(PICTURES[0].to_vllm(oracle), GREEDY, use_tqdm=False)


def test_ngram_speculation(checkpoint, reference, monkeypatch):
    # It loads numba, beside which vLLM cannot start another CPU engine in the same process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    oracle = reference(checkpoint(MODEL))
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    options = {"speculative_config": speculative, "max_num_batched_tokens": 96, "disable_log_stats": False}
    with running(checkpoint(MODEL), {"layer": LAYER}, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
        drafted = {
            m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name and hasattr(m, "value")
        }
    assert drafted["vllm:spec_decode_num_draft_tokens"] > drafted["vllm:spec_decode_num_accepted_tokens"] > 0
    for ask, output in zip(SHAPES, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, align_to=1)
