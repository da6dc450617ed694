"""Greedy answers in float32 equal the reference's, token for token, over models, layers and requests."""

import itertools
from collections.abc import Iterable

import pytest

from benchmarks.small_llava import TEXT_CONFIGS, SmallLlava
from tests.engine.engines import BLOCK_SIZE, GREEDY, SHAPES, assert_follows, free_blocks, running

DEPTHS = [(layers, layer) for layers in (4, 6, 8) for layer in (1, layers // 2, layers - 1, layers)]
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
ALL = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in itertools.product(*FACTORS)
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
        assert output_ids == single.outputs[0].token_ids, ask.name
        assert_follows(oracle, ask, batched.prompt_token_ids, output_ids, layer, BLOCK_SIZE if align else 1)
