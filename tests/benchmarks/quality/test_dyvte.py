# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed accuracies of gates, and what pages say of them."""

import json
from itertools import product
from pathlib import Path

from benchmarks.quality.dyvte import BORDERS, THRESHOLDS, mean_right, rival, table
from benchmarks.quality.evaluate import TIE
from benchmarks.quality.tasks import TASKS

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/dyvte.json").read_text())
GATED = [row for row in RESULT["rows"] if row["layers"]]


def test_every_threshold_is_there_and_the_reference_agrees():
    found = [(tuple(row["layers"]), row["name"].rpartition("= ")[2]) for row in GATED]
    assert found == [(borders, f"{threshold:g}") for borders, threshold in product(BORDERS, THRESHOLDS)]
    assert max(row["largest_gap"] for row in GATED) < TIE
    assert "dirty" not in RESULT["revision"]


def test_tables_say_what_was_measured():
    page = table(RESULT["rows"])
    assert (ROOT / "benchmarks/results/dyvte.md").read_text() == page + "\n"
    documented = (ROOT / "docs/gates.md").read_text().splitlines()
    shown = [line for line in documented if line.startswith(("| gates at", "| VTW, K"))]
    assert shown
    elsewhere = (ROOT / "benchmarks/results/task-layers.md").read_text().splitlines()
    assert set(shown) <= {*page.splitlines(), *elsewhere}


def test_vtw_beside_gates_takes_no_more_work():
    for row in GATED:
        vtw = rival(row, RESULT["rows"])
        assert vtw is not None
        assert vtw["prefill_flops_share"] <= row["prefill_flops_share"]


def test_what_the_documentation_says_of_gates():
    """Reading takes longer than yes or no; and at no more work no VTW is as good."""
    for row in GATED:
        exits = row["exits"]
        assert min(exits["ocr"], exits["caption"]) > max(exits[task] for task in ("presence", "counting"))
        vtw = rival(row, RESULT["rows"])
        assert vtw is not None
        assert mean_right(row) > mean_right(vtw)
        assert set(exits) == set(TASKS)
