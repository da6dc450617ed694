"""The step plan against going through a batch token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import ALIGNMENTS, Prompt, prompts
from vllm_vtw.retention import Retention
from vllm_vtw.worker.plan import Batch, plan_stage


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[Prompt, int, int]]:
    """Requests with what was computed of each before, and what is scheduled now."""
    rows = []
    for prompt in draw(st.lists(prompts(), min_size=1, max_size=5)):
        computed = draw(st.integers(0, prompt.length + 8))
        rows.append((prompt, computed, draw(st.integers(1, 30))))
    return rows


@given(steps(), ALIGNMENTS)
def test_a_plan_is_what_going_through_the_tokens_gives(step, align_to):
    retentions = [(prompt.retention(align_to),) for prompt, _, _ in step]
    computed = np.array([row[1] for row in step], dtype=np.int64)
    scheduled = np.array([row[2] for row in step], dtype=np.int64)
    plan = plan_stage(Batch(retentions, computed, scheduled), 1)

    kept, rows, ranks, starts, seq_lens, index = [], [], [], [0], [], 0
    for row, (prompt, before, now) in enumerate(step):
        held = prompt.held(before + now, align_to)
        for position in range(before, before + now):
            if position in held:
                kept.append(index)
                rows.append(row)
                ranks.append(held.index(position))
            index += 1
        starts.append(len(kept))
        seq_lens.append(len(held))

    if all(retention.num_withdrawn == 0 for (retention,) in retentions):
        assert plan is None
        return
    assert plan is not None
    assert (list(range(index)) if plan.kept is None else plan.kept.tolist()) == kept
    assert plan.rows.tolist() == rows
    assert plan.ranks.tolist() == ranks
    assert plan.query_start_loc.tolist() == starts
    assert plan.seq_lens.tolist() == seq_lens


def test_a_batch_of_texts_has_no_plan():
    texts = [(Retention(),)] * 3
    assert plan_stage(Batch(texts, np.array([0, 5, 9]), np.array([4, 1, 1])), 1) is None


def test_decoding_gathers_nothing():
    picture = Retention([(2, 50)])
    plan = plan_stage(Batch([(picture,), (Retention(),)], np.array([60, 7]), np.array([1, 1])), 1)
    assert plan is not None
    assert plan.kept is None
    assert plan.ranks.tolist() == [12, 7]
    assert plan.seq_lens.tolist() == [13, 8]
