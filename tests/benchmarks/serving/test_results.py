# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed results: their form, and that tables and the documentation say what is in them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from benchmarks.serving import show
from benchmarks.serving.compare import compare, named, read
from benchmarks.serving.sweeps import told
from vllm_vtw.policy import Policy

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/benchmarks.md"
SCHEMA = json.loads((ROOT / "benchmarks/serving/result.schema.json").read_text())
PROFILE, QWEN_PROFILE = (ROOT / f"benchmarks/results/serving-cpu{of}-profile.json" for of in ("", "-qwen"))
RESULTS = sorted({*(ROOT / "benchmarks/results").glob("serving-*.json")} - {PROFILE, QWEN_PROFILE})
CPU, QWEN, SCHEDULE, RANKINGS = (
    ROOT / f"benchmarks/results/serving-cpu{what}.json" for what in ("", "-qwen", "-schedule", "-rankings")
)


def test_there_are_results():
    assert {CPU, QWEN, SCHEDULE, RANKINGS} <= set(RESULTS)


@pytest.fixture(params=RESULTS, ids=lambda file: file.stem)
def file(request) -> Path:
    return request.param


def test_results_are_as_the_schema_says(file):
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(json.loads(file.read_text()))


def test_every_point_ran_twice_on_each_side_with_the_same_requests(file):
    result = json.loads(file.read_text())
    compared = compare(result)
    wanted = [(n, policy) for n, point in enumerate(result["points"]) for policy in point["policies"]]
    found = [(result["points"].index(one.point), told(one.policy)) for one in compared]
    assert json.loads(json.dumps(found)) == [
        [n, one] for n, one in wanted if str(n) not in result["left_out"]
    ]
    for one in compared:
        assert [run["seed"] for run in one.stock] == [run["seed"] for run in one.vtw]
        assert len({run["seed"] for run in one.stock}) == len(one.stock) == 2
        for stock, vtw in zip(one.stock, one.vtw, strict=True):
            assert stock["output"]["total_input_tokens"] == vtw["output"]["total_input_tokens"]
            assert stock["output"]["total_output_tokens"] == vtw["output"]["total_output_tokens"]


def options_of(policy: Policy) -> dict[str, Any]:
    if policy.ranking is None:
        return {"layer": policy.stages[0].layer}
    return {"policy": f".cache/serving/{named(policy).replace(' ', '-')}.json"}


def test_servers_differ_in_nothing_but_the_plugin(file):
    def options(run) -> set[str]:
        command = run["serve"]
        return set(command) - {command[command.index("--port") + 1]}

    for one in compare(json.loads(file.read_text())):
        vtw = {"--model-impl=vtw", "--additional-config=" + json.dumps({"vtw": options_of(one.policy)})}
        for ours, theirs in zip(one.vtw, one.stock, strict=True):
            assert options(ours) - vtw == options(theirs)
            assert vtw <= options(ours)


def test_tables_are_made_from_the_result(file):
    assert file.with_suffix(".md").read_text() == show.tables(json.loads(file.read_text()))


def test_plots_are_made_from_the_result(file, tmp_path):
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    for plot in (show.write_plots(copy), file.with_suffix(".png")):
        with Image.open(plot) as image:
            assert image.info[show.MADE_FROM] == show.digest(file)


def test_the_documentation_says_what_was_measured():
    page = PAGE.read_text()
    number, numbers = r"([\d.]+)", r"([\d.]+), ([\d.]+)"
    row = rf"^\| ([^|]+) \| {numbers} \| \*\*{number}\*\* \| ([\d.]*) \| ([\d.]*) \| {numbers} \|$"
    rows = re.findall(row, page, re.M)
    compared = {
        one.label: one
        for file in (CPU, QWEN, SCHEDULE, RANKINGS)
        for one in compare(json.loads(file.read_text()))
    }
    assert {label for label, *_ in rows} == compared.keys()
    for label, stock, vtw, ratio, limit, reached, *at_once in rows:
        one = compared[label]
        assert [stock, vtw] == [f"{value:.2f}" for value in one.means("output", "request_throughput")]
        assert ratio == f"{one.speed:.2f}"
        assert limit == ("" if one.limits is None else f"{one.limits.speed:.2f}")
        assert reached == show.reached(one)
        assert at_once == [f"{value:.1f}" for value in one.means("steps", "mean_running")]


def test_the_documentation_says_where_the_time_went():
    page = " ".join(PAGE.read_text().split())
    profiles = {one["row"]: one["seconds"] for one in json.loads(PROFILE.read_text())["profiles"]}
    missed = [
        one.label for one in compare(json.loads(CPU.read_text())) if float(show.reached(one) or 1) < 0.9
    ]
    assert profiles.keys() >= set(missed)

    def shares(side: str, *parts: str) -> str:
        hosts = [profile[side]["host"] for profile in profiles.values()]
        found = [sum(host[part] for part in parts) / sum(host.values()) for host in hosts]
        return f"{100 * min(found):.1f} to {100 * max(found):.1f}%"

    assert (
        f"it takes {shares('stock', 'decoder')} of stock vLLM's time and {shares('vtw', 'decoder')} of the "
        f"plugin's, whose own work, step plan, gather and scatter, takes "
        f"{shares('vtw', 'step plan', 'gather and scatter')}"
    ) in page
    assert (
        f"The vision tower, which is not withdrawn, takes {shares('stock', 'vision tower')} of stock vLLM's "
        f"time and {shares('vtw', 'vision tower')} of the plugin's"
    ) in page


def test_the_documentation_says_what_the_vision_tower_takes():
    page = " ".join(PAGE.read_text().split())
    tower = []
    for profile in json.loads(QWEN_PROFILE.read_text())["profiles"]:
        for side in ("stock", "vtw"):
            host = profile["seconds"][side]["host"]
            tower.append(f"{100 * host['vision tower'] / sum(host.values()):.0f}")
    assert (
        "the vision tower takes {} and {}% of stock vLLM's time with 256 and 1,024 visual tokens, and {} and "
        "{}% of the plugin's"
    ).format(*tower[::2], *tower[1::2]) in page


@pytest.mark.parametrize("content", [None, "no JSON", "{}", "[]"])
def test_a_file_that_is_no_result_is_told(content, tmp_path):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"{file.name} (cannot be read|is no result)"):
        read(file)
