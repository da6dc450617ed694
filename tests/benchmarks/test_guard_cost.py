# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How runs with and without a guard are compared, and what the documentation says of them."""

import json
from collections import Counter
from pathlib import Path

from benchmarks.guard_cost import LOADS, METRICS, SHARES, back_and_forth, compared

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-guard-cost.json"
PAGE = Path(__file__).parents[2] / "docs/guard.md"


def test_the_order_goes_back_as_it_came():
    order = list(back_and_forth(4))
    assert order == order[::-1]
    assert Counter(order) == dict.fromkeys(SHARES, 4)


def test_a_run_that_stands_out_changes_no_ratio():
    runs = [
        {
            "load": load,
            "share": share,
            **dict.fromkeys(METRICS, 10 * (1 + share) * (100 if turn == 2 and share == 0.1 else 1)),
            "guard": {"requests": 3, "left_out": 1} if share else {},
        }
        for load in LOADS
        for share in SHARES
        for turn in range(3)
    ]
    rows = compared(runs)
    assert [(row["load"], row["share"]) for row in rows] == [
        (load, share) for load in LOADS for share in SHARES
    ]
    for row in rows:
        assert all(abs(ratio - 1 - row["share"]) < 1e-9 for ratio in row["ratios"].values())
        assert (row["read"], row["left_out"]) == ((9, 3) if row["share"] else (0, 0))


def test_the_committed_rows_are_those_of_the_runs_and_in_the_documentation():
    result = json.loads(RESULTS.read_text())
    assert result["rows"] == compared(result["runs"])
    text = PAGE.read_text()
    for row in result["rows"]:
        if row["share"]:
            ratios = [row["ratios"][name] for name in ("request_throughput", "median_ttft_ms", "p99_ttft_ms")]
            cells = [row["load"], f"{row['share']:.0%}", *(f"{ratio:.2f}" for ratio in ratios)]
            cells += [f"{row['ratios']['median_tpot_ms']:.2f}", f"{row['read']:g}", f"{row['left_out']:g}"]
            assert f"| {' | '.join(cells)} |" in text
