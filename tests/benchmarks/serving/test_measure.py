# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A whole measurement, small: servers, vLLM's client, result, tables and plot."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from benchmarks.serving import show
from benchmarks.serving.compare import compare
from benchmarks.serving.models import Model
from benchmarks.serving.run import measure
from benchmarks.serving.sweeps import Engine, Point, Setup
from benchmarks.serving.workload import Workload
from tests.benchmarks.serving.test_results import SCHEMA
from vllm_vtw.policy import Policy

TINY = Model("tiny", 4, 64, 128, 2, 1024, 6, 2, 64)
POLICY = Policy.withdraw_at(2, TINY.layers)
PLAIN, CACHING, TOO_SMALL = Engine(kv_mib=1), Engine(kv_mib=1, prefix_caching=True), Engine(kv_mib=0)
SETUP = Setup(
    TINY,
    ("--load-format=dummy", "--dtype=float32", "--block-size=32", "--max-model-len=128", "--enforce-eager"),
    {"ttft": 60_000, "tpot": 10_000},
    (
        Point("KV memory", "1 MiB", Workload(requests=8, text=4, output=56), PLAIN, (POLICY,)),
        Point(
            "prefix caching", "2 questions", Workload(8, text=4, output=8, questions=2), CACHING, (POLICY,)
        ),
        Point("KV memory", "none", Workload(requests=1, text=4, output=8), TOO_SMALL, (POLICY,)),
    ),
    resident=True,
    asynchronous=False,
)


@pytest.mark.slow
def test_measures_both_sides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved: list[str] = []
    measured = measure("tiny", SETUP, Path("work"), lambda found: saved.append(json.dumps(found)))
    assert json.loads(saved[-1]) == json.loads(json.dumps(measured))
    result = {**json.loads(saved[-1]), "command": "none", "revision": "0000000"}
    Draft202012Validator(SCHEMA).validate(result)
    assert list(result["left_out"]) == ["2"]
    assert len(saved) - 1 == len(result["runs"]) == 8
    order = [(run["point"], run["policy"], run["seed"]) for run in result["runs"]]
    vtw = {"stages": [{"layer": 2, "keep": 0.0}]}
    sides = ((None, 0), (vtw, 0), (vtw, 1), (None, 1))
    assert order == [(point, policy, 2 * point + turn) for point in (0, 1) for policy, turn in sides]

    random, repeated = compare(result)
    for run in (*random.stock, *random.vtw):
        assert run["output"]["completed"] == 8
        assert run["output"]["total_output_tokens"] == 448
        assert run["output"]["request_goodput"] == run["output"]["request_throughput"]
        assert run["steps"]["seconds"] <= run["output"]["duration"] * 1.1
        assert 0 < run["steps"]["prefill"] < run["steps"]["seconds"]
    assert any("vtw: withdrawing" in line for line in random.vtw[0]["start_up"])
    # A MiB holds four of the eight requests in stock vLLM.
    assert random.short_of_memory
    assert random.ratio("steps", "most_running") > 1
    # The second question about an image finds the first one's blocks, on both sides.
    assert repeated.limits is None
    assert all(run["prefix_hits"] > 0 for run in (*repeated.stock, *repeated.vtw))
    assert not any(run["prefix_hits"] for run in (*random.stock, *random.vtw))

    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(result))
    assert "| prefix caching: 2 questions |" in show.write_tables(file).read_text()
    assert show.write_plots(file).exists()

    # Nothing is left to do but what could not be done.
    again = measure("tiny", SETUP, Path("work"), lambda found: None, json.loads(saved[-1]))
    assert again["runs"] == json.loads(saved[-1])["runs"]
    with pytest.raises(ValueError, match="another points"):
        measure("tiny", SETUP.chosen("2"), Path("work"), lambda found: None, json.loads(saved[-1]))
