# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Many requests of random shapes and layers, with aborts, preemptions and a guard, on one engine."""

import random
from dataclasses import dataclass, field
from typing import Any

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

LAYERS, BLOCK_SIZE, LONGEST = (3, 6, MODEL.layers), 32, 40
"""The layers that requests choose from. The last one withdraws nothing."""
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
    read: int = 0
    """Answers that the guard has read."""
    preempted: set[str] = field(default_factory=set)


def greedy(tokens: int, layer: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"vtw_layer": layer})


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
    vtw = {"layers": [*LAYERS[:2]], "align": align, "guard": {"share": 0.5}}
    with running(checkpoint(MODEL), vtw, **options) as llm:
        engine, scheduler, all_free = llm.llm_engine, scheduler_of(llm), free_blocks(llm)
        alone = {}
        for which, ask in enumerate(ASKS):
            for layer in LAYERS:
                output = llm.generate(ask.to_vllm(oracle), greedy(LONGEST, layer), use_tqdm=False)[0]
                ids = output.outputs[0].token_ids
                assert_follows(oracle, ask, output.prompt_token_ids, ids, layer, BLOCK_SIZE if align else 1)
                alone[which, layer] = ids
        assert llm.reset_prefix_cache()
        original = scheduler.statistics.count_reading

        def count_reading(*args: Any, **options: Any) -> None:
            soak.read += 1
            original(*args, **options)

        scheduler.statistics.count_reading = count_reading

        waiting = iter(range(num_requests))
        asked: dict[str, tuple[int, int, int]] = {}
        while asked or soak.finished + soak.aborted < num_requests:
            # The guard reads in the quiet times between.
            at_once = 16 if soak.finished // 25 % 2 else 4
            while len(asked) < at_once and rng.random() < 0.7 and (number := next(waiting, None)) is not None:
                which, tokens = rng.randrange(len(ASKS)), rng.randint(1, LONGEST)
                layer = rng.choice(LAYERS)
                asked[str(number)] = (which, tokens, layer)
                engine.add_request(str(number), ASKS[which].to_vllm(oracle), greedy(tokens, layer))
            for output in engine.step():
                if output.finished and output.request_id in asked:
                    which, tokens, layer = asked.pop(output.request_id)
                    assert output.outputs[0].token_ids == alone[which, layer][:tokens], ASKS[which].name
                    soak.finished += 1
                    soak.cached_tokens += output.num_cached_tokens
            soak.preempted.update(r.request_id for r in scheduler.running if r.num_preemptions)
            if asked and rng.random() < 0.03:
                victim = rng.choice(sorted(asked))
                engine.abort_request([victim])
                del asked[victim]
                soak.aborted += 1
        while scheduler.has_requests():
            engine.step()
        assert free_blocks(llm) == all_free
        assert not scheduler.retentions
    # Each of these happened, and often.
    assert soak.finished > num_requests * 0.7
    assert soak.aborted > num_requests * 0.02
    assert len(soak.preempted) > num_requests * 0.02
    assert soak.cached_tokens > num_requests * (20 if align else 5)
    assert soak.read > num_requests * 0.02
