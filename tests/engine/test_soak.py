# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Many requests of random shapes, with aborts, preemptions and cache hits, on one engine."""

import random
from dataclasses import dataclass, field

import pytest
from vllm import SamplingParams

from tests.engine.engines import (
    FILLER,
    MODEL,
    SHAPES,
    A,
    Ask,
    B,
    C,
    assert_follows,
    free_blocks,
    running,
    scheduler_of,
)

LAYER, BLOCK_SIZE, LONGEST = 3, 32, 40
ASKS = [
    *SHAPES,
    *(
        Ask(f"{place} {number}", prompt.format(question), (image,))
        for number, image in enumerate((A, B, C))
        for place, prompt in (("first", "USER: <image>\n{} ASSISTANT:"), ("late", FILLER + "<image>{}"))
        for question in ("What?", "Why is it so?")
    ),
    *(Ask(f"text {size}", "USER: " + FILLER * size + "ASSISTANT:") for size in (1, 2, 4)),
]


@dataclass
class Soak:
    """What went on."""

    finished: int = 0
    aborted: int = 0
    cached_tokens: int = 0
    preempted: set[str] = field(default_factory=set)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@pytest.mark.parametrize(
    ("num_requests", "align"),
    [
        (200, True),
        pytest.param(2000, True, marks=pytest.mark.slow),
        pytest.param(2000, False, marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_that_of_the_request_alone(checkpoint, reference, num_requests, align):
    rng = random.Random(num_requests + align)
    oracle = reference(checkpoint(MODEL))
    options = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 12,
        "num_gpu_blocks_override": 72,
        "max_model_len": 480,
        "disable_log_stats": False,
    }
    soak = Soak()
    with running(checkpoint(MODEL), {"layer": LAYER, "align": align}, **options) as llm:
        engine, scheduler, all_free = llm.llm_engine, scheduler_of(llm), free_blocks(llm)
        alone = []
        for ask in ASKS:
            output = llm.generate(ask.to_vllm(oracle), greedy(LONGEST), use_tqdm=False)[0]
            ids = output.outputs[0].token_ids
            assert_follows(oracle, ask, output.prompt_token_ids, ids, LAYER, BLOCK_SIZE if align else 1)
            alone.append(ids)
        assert llm.reset_prefix_cache()

        waiting = iter(range(num_requests))
        asked: dict[str, tuple[int, int]] = {}
        while asked or soak.finished + soak.aborted < num_requests:
            while len(asked) < 16 and rng.random() < 0.7 and (number := next(waiting, None)) is not None:
                which, tokens = rng.randrange(len(ASKS)), rng.randint(1, LONGEST)
                asked[str(number)] = (which, tokens)
                engine.add_request(str(number), ASKS[which].to_vllm(oracle), greedy(tokens))
            for output in engine.step():
                if output.finished and output.request_id in asked:
                    which, tokens = asked.pop(output.request_id)
                    assert output.outputs[0].token_ids == alone[which][:tokens], ASKS[which].name
                    soak.finished += 1
                    soak.cached_tokens += output.num_cached_tokens
            soak.preempted.update(r.request_id for r in scheduler.running if r.num_preemptions)
            if asked and rng.random() < 0.03:
                victim = rng.choice(sorted(asked))
                engine.abort_request([victim])
                del asked[victim]
                soak.aborted += 1
        while engine.has_unfinished_requests():
            engine.step()
        assert free_blocks(llm) == all_free
        assert not scheduler.retentions
    # Each of these happened, and often.
    assert soak.finished > num_requests * 0.7
    assert soak.aborted > num_requests * 0.02
    assert len(soak.preempted) > num_requests * 0.02
    assert soak.cached_tokens > num_requests * (20 if align else 5)
