# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed accuracies of a layer for each task, what a guard saw, and what pages say of them."""

import json
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.dyvte import mean_right
from benchmarks.quality.evaluate import TIE
from benchmarks.quality.task_layers import GUARDED, agreement, beside, guard_table, table
from benchmarks.quality.tasks import TASKS

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/task-layers.json").read_text())


def test_tables_say_what_was_measured():
    answers, guard = table([*beside(), RESULT["row"]]), guard_table(RESULT["guard"])
    assert (ROOT / "benchmarks/results/task-layers.md").read_text() == f"{answers}\n\n{guard}\n"
    assert answers in (ROOT / "docs/choosing-a-layer.md").read_text()
    assert guard in (ROOT / "docs/guard.md").read_text()


def test_every_task_got_its_layer_and_the_reference_agrees():
    row = RESULT["row"]
    assert row["tasks"] == {task: RESULT["per_task"]["tasks"][task]["layer"] for task in TASKS}
    assert row["largest_gap"] < TIE


def test_what_the_documentation_says_of_layers_for_tasks():
    """At the work of gates with a threshold of 2, more answers are right. One K for all takes more work."""
    row = RESULT["row"]
    (single,) = [other for other in beside() if "calibrate" in other["name"]]
    gates = [other for other in beside() if other["name"].endswith("t = 2")]
    assert single["prefill_flops_share"] > row["prefill_flops_share"] + 0.1
    assert mean_right(single) - mean_right(row) < 0.005
    assert all(mean_right(other) < mean_right(row) for other in gates)


def test_the_guard_agrees_with_the_calibration_but_where_captions_are_ruined():
    for task, by_layer in RESULT["guard"].items():
        for layer, one in by_layer.items():
            if task != "caption" or int(layer) > 8:
                assert abs(one["errors"]) < 2, (task, layer)
    assert {*RESULT["guard"]["ocr"]} == {*map(str, GUARDED)}


@given(st.integers(1, 999), st.data())
def test_agreement_is_that_of_two_samples_of_one_share(tokens: int, data: st.DataObject):
    changed = data.draw(st.integers(0, tokens))
    same = agreement((tokens, changed), (tokens, changed / tokens))
    assert same["errors"] == pytest.approx(0, abs=1e-9)
    other = agreement((tokens, changed), (tokens, 0.0))
    pooled = changed / tokens / 2
    expected = changed / tokens / sqrt(pooled * (1 - pooled) * 2 / tokens) if changed else 0
    assert other["errors"] == pytest.approx(expected)
