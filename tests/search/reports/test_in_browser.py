# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reports in a browser: light and dark, on a wide screen and on a phone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.search.command import LOOK, calibrate, dyvte, searched
from tests.search.reports.faults import Scheme, faults
from tools.browser import EXECUTABLE, chromium
from vllm_vtw.search.reports import calibration
from vllm_vtw.search.reports.page import page

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="there is no chromium on the PATH")
REPORTS = ("calibrate", "per task", "no K", "long names", "gsearch", "psigmoid", "dyvte train", "dyvte eval")
NAMES = ("a_name_of_one_word_" * 4, "a task whose name is a sentence " * 5, "W" * 24, "_hidden", "<i>", "$x$")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def reports(done: Any, gsearched: Any, gates: Any, data: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """The folder of each report, by its name in `REPORTS`."""
    found = {"calibrate": done[0], "gsearch": gsearched[0], "dyvte train": gates[0]}
    found |= {name: tmp_path_factory.mktemp("report") / "out" for name in REPORTS if name not in found}
    for name, status, *options in (("per task", 0, "--per-task"), ("no K", 1, "--max-answer-kl=0")):
        shutil.copytree(done[0], found[name])
        assert calibrate(data, found[name], "--resume", *options).status == status
    assert searched("psigmoid", data, found["psigmoid"], "--budget=0.7", "--trials=2").status == 0
    policy = f"--policy={gates[0] / 'policy.json'}"
    assert dyvte("eval", data, found["dyvte eval"], policy, *LOOK).status == 0
    found["long names"].mkdir()
    result = renamed(json.loads((done[0] / "result.json").read_text()))
    (found["long names"] / "result.json").write_text(json.dumps(result))
    (found["long names"] / "report.html").write_text(calibration.html(result, "vllm serve " + "x" * 200))
    return found


def renamed(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a calibration with other tasks and another checkpoint."""
    new = dict(zip(result["tasks"], NAMES, strict=True))

    def of(by_task: dict[str, Any]) -> dict[str, Any]:
        return {new[task]: value for task, value in by_task.items()}

    policies = {
        name: policy | {"curves": of(policy["curves"])} for name, policy in result["policies"].items()
    }
    changed = {"tasks": of(result["tasks"]), "curves": of(result["curves"]), "policies": policies}
    return result | changed | {"made": result["made"] | {"checkpoint": "/a_long_name_of_a_folder" * 8}}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("report", REPORTS)
def test_a_report_is_legible(
    browser: Browser, reports: dict[str, Path], report: str, scheme: Scheme, width: int
):
    assert faults(browser, reports[report] / "report.html", scheme, width) == []


def test_the_choice_and_its_price_come_first(browser, reports):
    shown = browser.new_page()
    results, heads = {}, {}
    for name in REPORTS:
        shown.goto((reports[name] / "report.html").as_uri())
        heads[name] = shown.locator("h1").inner_text(), shown.locator(".price dd").all_inner_texts()
        results[name] = json.loads((reports[name] / "result.json").read_text())
    shown.close()

    def shares(of: dict[str, Any]) -> list[str]:
        return [f"{of[name]:.1%}" for name in ("kv_share", "prefill_flops_share")]

    vtw = next(iter(results["calibrate"]["policies"].values()))
    price = ["0.0%", "0.0%", *shares(vtw)]
    assert heads["calibrate"] == ("Visual tokens leave at K = 11 of 12 layers", price)
    assert heads["no K"] == ("No K satisfies the answer criterion", [])
    per_task = results["per task"]["per_task"]
    layers = ", ".join(map(str, sorted({task["layer"] for task in per_task["tasks"].values()})))
    assert heads["per task"][0] == f"Visual tokens leave at a layer for each task: K = {layers} of 12 layers"
    assert heads["per task"][1][2:] == shares(per_task["all"])
    for name in ("gsearch", "psigmoid"):
        assert heads[name][1][2:] == shares(results[name]["policies"][name])
    assert len(heads["dyvte train"][1]) == 2
    row = next(row for row in results["dyvte eval"]["rows"] if row["way"] == "gates of the policy")
    assert heads["dyvte eval"][1][2:] == shares(row["all"])


def test_faults_are_found(browser, reports, tmp_path):
    """In reports that were spoiled."""
    file = tmp_path / "report.html"
    values = json.loads((reports["dyvte eval"] / "result.json").read_text())
    plots = {
        "No curve": lambda axes: axes.plot([], label="nothing"),
        "A curve": lambda axes: axes.plot([0, 1], label="something"),
    }
    file.write_text(page("dyvte_eval.html", values, "Nothing", [], plots, command=None, quality=str))
    assert faults(browser, file, "dark", 390) == ["nothing is drawn in the plot: No curve"]
    good = (reports["calibrate"] / "report.html").read_text()
    file.write_text(good.replace('class="plots"', "").replace("prefers-color-scheme: dark", "print"))
    assert faults(browser, file, "dark", 390) == ["the color scheme is not followed", "there are no plots"]
    spoiled = {
        "the page is ": f"<table><tr>{'<td>a wide table</td>' * 30}</tr></table>",
        "off the screen: far": '<p style="position: absolute; left: -9rem">far</p>',
        "contrast of 3.5: grey": '<p style="color: #888">grey</p>',
        "text of 8.0 px: small": '<p style="font-size: 8px">small</p>',
        "cut off in a plot: long": '<svg><text x="290">long</text></svg>',
        "asks for http://a.test/": '<img src="http://a.test/">',
        "console: wrong": "<script>console.error('wrong')</script>",
        "console: thrown": "<script>throw 'thrown'</script>",
        "the choice and its price are not": "<p>Before the choice.</p>" * 30,
    }
    file.write_text(good.replace("<header>", f"{''.join(spoiled.values())}<header>"))
    found = faults(browser, file, "light", 1280)
    assert [fault for fault in spoiled if not any(one.startswith(fault) for one in found)] == []
