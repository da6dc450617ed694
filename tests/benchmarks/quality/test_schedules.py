# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed accuracies of searched schedules, and what pages say of them."""

import json
from pathlib import Path

from benchmarks.quality.evaluate import TIE
from benchmarks.quality.schedules import SEARCHES, against_vtw, beside_vtw, least_work, table

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/schedules.json").read_text())


def test_every_search_is_there_beside_others_at_no_more_work():
    rows = RESULT["rows"]
    assert {row["search"] for row in rows} == {"", *SEARCHES}
    for search in SEARCHES:
        own, *others = (row for row in rows if row["search"] == search)
        assert own["schedule"] == search
        for other in others:
            published = "published" in other["schedule"]
            assert published or other["prefill_flops_share"] <= own["prefill_flops_share"]


def test_the_reference_agrees():
    gaps = [row["largest_gap"] for row in RESULT["rows"][1:]]
    assert len(gaps) == len(RESULT["rows"]) - 1
    assert max(gaps) < TIE


def test_tables_say_what_was_measured():
    page = table(RESULT["rows"])
    assert (ROOT / "benchmarks/results/schedules.md").read_text() == page + "\n"
    documented = (ROOT / "docs/schedules.md").read_text().splitlines()
    shown = [line for line in documented if line.startswith(("| G-Search, ", "| P-Sigmoid, "))]
    assert len(shown) == 2 * len(SEARCHES)
    assert set(shown) <= set(page.splitlines())


def test_what_beats_vtw_is_told():
    def row(search: str, schedule: str, right: float, work: float):
        engine = {"right": {"one": right, "other": right}}
        return {
            "search": search,
            "schedule": schedule,
            "engine": engine,
            "prefill_flops_share": work,
            "kv_share": 1,
        }

    rows = [
        row("", "stock", 1.0, 1.0),
        row("G-Search, 1", "G-Search, 1", 0.995, 0.8),
        row("G-Search, 1", "VTW, K = 3", 0.9, 0.7),
        row("P-Sigmoid, 1", "P-Sigmoid, 1", 0.5, 0.3),
        row("P-Sigmoid, 1", "VTW, K = 1", 0.6, 0.2),
    ]
    assert [beside_vtw(one, rows) for one in (rows[0], rows[2])] == [None, None]
    assert against_vtw(rows).endswith("VTW is beaten by G-Search, 1, and not by P-Sigmoid, 1.")
    assert "at 80.0% of its work" in least_work(rows, "G-Search")
    assert "no schedule of these stays" in least_work(rows, "VTW")
