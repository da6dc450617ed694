# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The step plan against going through a batch token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.strategies import ALIGNMENTS, Prompt, prompts
from vllm_vtw.retention import OneStepPrefill, Retention
from vllm_vtw.worker.step_plan import Batch, BatchRetentions, plan_stage, ranked_tokens


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
    batch = Batch(BatchRetentions.of(retentions), computed, np.cumsum([0, *scheduled]))
    plan = plan_stage(batch, 1)

    kept, rows, ranks, positions, starts, held_after, index = [], [], [], [], [0], [], 0
    for row, (prompt, before, now) in enumerate(step):
        held = prompt.held(before + now, align_to)
        for position in range(before, before + now):
            if position in held:
                kept.append(index)
                rows.append(row)
                positions.append(position)
                ranks.append(held.index(position))
            index += 1
        starts.append(len(kept))
        held_after.append(len(held))

    assert (computed + scheduled - plan.num_withdrawn).tolist() == held_after
    token_rows = np.repeat(np.arange(len(step)), scheduled)
    if len(kept) == index:
        assert plan.split is None
        assert (np.array(positions) - plan.num_withdrawn[token_rows]).tolist() == ranks
    else:
        assert plan.split is not None
        assert plan.split.kept.tolist() == kept
        assert sorted([*kept, *plan.split.left_out]) == list(range(index))
        assert token_rows[plan.split.kept].tolist() == rows
        assert (np.array(positions) - plan.split.shifts[plan.split.kept]).tolist() == ranks
        assert plan.split.query_start_loc.tolist() == starts
    if plan.is_final:
        assert plan.num_withdrawn.tolist() == [retention.num_withdrawn for (retention,) in retentions]


def test_the_plan_of_texts_is_final_from_the_start():
    texts = [(Retention(),)] * 3
    plan = plan_stage(Batch(BatchRetentions.of(texts), np.array([0, 5, 9]), np.array([0, 4, 5, 6])), 1)
    assert plan.is_final
    assert plan.split is None
    assert plan.num_withdrawn.tolist() == [0, 0, 0]


def test_decoding_withdraws_nothing_more():
    rows = BatchRetentions.of([(Retention([(2, 50)]),), (Retention(),)])
    plan = plan_stage(Batch(rows, np.array([60, 7]), np.array([0, 1, 2])), 1)
    assert plan.is_final
    assert plan.split is None
    assert plan.num_withdrawn.tolist() == [48, 0]


def ranked(leaving: int) -> Retention:
    return Retention([(5, 5 + leaving)], 5, OneStepPrefill(5, 20, ((5, 12), (15, 18)), 18, False))


def test_prompts_that_rank_are_told():
    rows = BatchRetentions.of(
        [(Retention(),), (ranked(4),), (ranked(4),), (ranked(4),), (Retention([(2, 6)]),)]
    )
    # Text alone; the text before the picture; from there to the end; decoding; a picture that is not ranked.
    batch = Batch(rows, np.array([0, 0, 5, 30, 0]), np.cumsum([0, 4, 5, 15, 1, 8]))
    plan = plan_stage(batch, 1)
    assert plan.split is not None
    assert plan.split.ranked == (2,)
    assert plan.split.query_start_loc.tolist() == [0, 4, 9, 20, 21, 25]
    mask = ranked_tokens(batch, plan.split.ranked)
    assert np.flatnonzero(mask).tolist() == [*range(9, 16), *range(19, 22)]


@pytest.mark.parametrize(("computed", "scheduled"), [(0, 19), (6, 14)])
def test_a_ranked_prompt_that_is_cut_ranks_nothing(computed, scheduled):
    """Its request ends with an error. The plan of the others, and the number of its tokens, are as ever."""
    rows = BatchRetentions.of([(ranked(4),), (Retention([(2, 6)]),)])
    plan = plan_stage(Batch(rows, np.array([computed, 0]), np.cumsum([0, scheduled, 8])), 1)
    assert plan.split is not None
    assert plan.split.ranked == ()
    assert plan.split.query_start_loc[-1] - plan.split.query_start_loc[1] == 4
    assert plan.num_withdrawn[0] == computed + scheduled - ranked(4).count(computed + scheduled)


@pytest.mark.parametrize(("computed", "scheduled"), [(0, 19), (6, 14), (0, 21)])
def test_gates_are_asked_about_whole_prompts_alone(computed, scheduled):
    one_step = OneStepPrefill(5, 20, ((5, 12),), 12, True)
    all_kept = Retention((), 5, one_step)
    rows = BatchRetentions.of([(all_kept,), (all_kept,)])
    batch = Batch(rows, np.array([computed, 0]), np.cumsum([0, scheduled, 20]))
    assert batch.gated_prompts() == {1: one_step}
