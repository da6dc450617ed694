# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Greedy answers in float32 equal the reference's, token for token, over models, layers and requests."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks.small_llava import TEXT_CONFIGS, SmallLlava
from tests.engine.engines import BLOCK_SIZE, GREEDY, SHAPES, assert_follows, free_blocks, running

DEPTHS = [(layers, layer) for layers in (4, 8) for layer in (1, layers // 2, layers - 1, layers)]
FACTORS = (DEPTHS, (False, True), (2, 1), tuple(TEXT_CONFIGS), (8192, 64))


def pairwise(factors: Iterable[Iterable]) -> list[tuple]:
    """Few combinations that hold every pair of values of any two factors."""
    everything = list(itertools.product(*factors))

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


FEW = pairwise(FACTORS)


def named(depth, align, kv_heads, backbone, batched_tokens) -> str:
    mode = "blocks" if align else "tokens"
    return f"K{depth[1]}of{depth[0]}-{mode}-{kv_heads}heads-{backbone}-{batched_tokens}"


ALL = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.slow, id=named(*case))
    for case in itertools.product(*FACTORS)
]


@pytest.mark.parametrize(("depth", "align", "kv_heads", "backbone", "batched_tokens"), ALL)
def test_every_request_shape(checkpoint, reference, depth, align, kv_heads, backbone, batched_tokens):
    layers, layer = depth
    folder = checkpoint(SmallLlava(layers=layers, kv_heads=kv_heads, backbone=backbone))
    oracle = reference(folder)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    # Prefix caching as whole blocks go with it by default; test_requests.py has the other pairing.
    options = {"max_num_batched_tokens": batched_tokens, "max_num_seqs": 8, "enable_prefix_caching": align}
    with running(folder, {"layer": layer, "align": align}, **options) as llm:
        all_free = free_blocks(llm)
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert free_blocks(llm) == all_free
    for ask, batched, single in zip(SHAPES, together, alone, strict=True):
        output_ids = batched.outputs[0].token_ids
        assert len(output_ids) == GREEDY.max_tokens
        assert output_ids == single.outputs[0].token_ids, ask.name
        assert_follows(oracle, ask, batched.prompt_token_ids, output_ids, layer, BLOCK_SIZE if align else 1)


@pytest.mark.parametrize("backbone", TEXT_CONFIGS)
def test_the_oracle_tells_answers_apart(checkpoint, reference, backbone):
    """Were it blind to the layer, to `align` or to the picture, the test above would show nothing."""
    oracle = reference(checkpoint(SmallLlava(backbone=backbone)))
    ask = next(ask for ask in SHAPES if ask.name == "text before")
    other = replace(ask, images=SHAPES[5].images)
    text = ask.prompt.replace("<image>", "<image>" * SmallLlava().image_side ** 2)
    prompt_ids = oracle.processor.tokenizer(text)["input_ids"]

    def answer(ask, layer, align_to):
        token_ids = list(prompt_ids)
        for _ in range(16):
            dropped = oracle.dropped(token_ids, len(prompt_ids), align_to)
            embeds = [oracle.embeds(image) for image in ask.images]
            token_ids.append(int(oracle.logits(token_ids, embeds, layer, dropped)[-1].argmax()))
        return token_ids[len(prompt_ids) :]

    assert_follows(oracle, ask, prompt_ids, answer(ask, 4, 1), 4, 1)
    for wrong in (answer(ask, 8, 1), answer(ask, 5, 1), answer(ask, 4, BLOCK_SIZE), answer(other, 4, 1)):
        with pytest.raises(AssertionError, match="text before"):
            assert_follows(oracle, ask, prompt_ids, wrong, 4, 1)
