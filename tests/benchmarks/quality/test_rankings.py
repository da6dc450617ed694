# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed accuracies of rankings, and what pages say of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.dyvte import mean_right
from benchmarks.quality.evaluate import TIE
from benchmarks.quality.rankings import NAMES, WORK, candidates, chosen, page, sentences, summary
from vllm_vtw.policy import BY_IMAGE, BY_QUESTION

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/rankings.json").read_text())
ROWS = RESULT["rows"]


def test_every_ranking_is_there_at_every_budget():
    methods = ["VTW", *(NAMES.get(ranking, ranking) for ranking in (*BY_IMAGE, *BY_QUESTION))]
    assert [(row["budget"], row["method"]) for row in ROWS[1:]] == [
        (budget, method) for budget in WORK for method in methods
    ]
    for row in ROWS:
        assert row["prefill_flops_share"] <= row["budget"]


def test_the_reference_agrees():
    gaps = [row["largest_gap"] for row in ROWS[1:] if row["method"] != "random"]
    assert len(gaps) == 6 * len(WORK)
    assert max(gaps) < TIE


def test_tables_say_what_was_measured():
    assert (ROOT / "benchmarks/results/rankings.md").read_text() == page(ROWS) + "\n"
    assert summary(ROWS) in (ROOT / "docs/rankings.md").read_text()


def test_a_method_withdraws_no_more_than_its_budget_asks_for():
    found = chosen(0.5, lambda policy: policy.keeps[-1] if policy.ranking else policy.stages[0].layer / 12)
    assert found["random"].stages[0].keep == 0.5
    assert found["VTW"].stages[0].layer == 6
    assert found.keys() == candidates().keys()


def test_plain_baselines_are_named_where_they_win():
    def row(method: str, right: float) -> dict[str, Any]:
        return {"budget": 0.5, "method": method, "engine": {"right": {"one": right}}}

    rows = [row("VTW", 0.4), row("uniform", 0.6), row("random", 0.5), row("variation", 0.7)]
    assert sentences(rows) == [
        "At 50% of the work, variation is best, 70.0% right, mean over tasks. "
        "Below uniform (60.0%): VTW, random."
    ]
    assert mean_right(rows[0]) == pytest.approx(0.4)
