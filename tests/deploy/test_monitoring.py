# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The dashboard, the alert and `vtw guard` ask for metrics that there are; the alert fires when it should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import vllm_vtw
from tools.dashboard import ALERTS, FOLDER, alerts, panels, queries
from vllm_vtw.commands import guard_counts

PANELS, QUERIES = panels(), queries()
SUFFIXES = ("_total", "_bucket", "_sum", "_count")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Debian's package `prometheus` has promtool"
)


def asked_for() -> set[str]:
    """The plugin's metrics that are asked for, named as in Prometheus."""
    command = (guard_counts.REQUESTS, guard_counts.LEFT_OUT, guard_counts.OF_GATES, *guard_counts.OF_ANSWERS)
    expressions = [*QUERIES, *(rule["expr"] for rule in alerts()), *command]
    return set(re.findall(r"vllm:vtw_\w+", " ".join(expressions)))


@pytest.mark.parametrize("name", sorted(asked_for()))
def test_the_plugin_has_what_is_asked_for(name):
    source = (Path(vllm_vtw.__file__).parent / "metrics.py").read_text(encoding="utf-8")
    there = set(re.findall(r"vllm:vtw_\w+", source))
    assert {name, *(name.removesuffix(suffix) for suffix in SUFFIXES)} & there


def test_the_guard_is_asked_for_in_all_places():
    guards = {name for name in asked_for() if name.startswith("vllm:vtw_guard_")}
    assert guards == {guard_counts.LEFT_OUT, *guard_counts.OF_ANSWERS} - {guard_counts.REQUESTS}
    shown = set(re.findall(r"vllm:vtw_guard_\w+", " ".join(QUERIES)))
    assert shown == {
        "vllm:vtw_guard_requests_total",
        "vllm:vtw_guard_left_out_total",
        "vllm:vtw_guard_changed_tokens_total",
        "vllm:vtw_guard_greedy_tokens_total",
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels(panel):
    """No panel hides another one, and a legend names what a query tells apart."""
    place = panel["gridPos"]
    others = [other["gridPos"] for other in PANELS if other is not panel]
    assert panel["id"] not in {other["id"] for other in PANELS if other is not panel}
    assert place["x"] + place["w"] <= 24
    for other in others:
        beside = place["x"] + place["w"] <= other["x"] or other["x"] + other["w"] <= place["x"]
        assert beside or place["y"] + place["h"] <= other["y"] or other["y"] + other["h"] <= place["y"]
    for target in panel["targets"]:
        labels = {label for by in re.findall(r"by \(([\w, ]+)\)", target["expr"]) for label in by.split(", ")}
        assert labels <= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))


@pytest.mark.parametrize("query", [query for query in QUERIES if guard_counts.REQUESTS in query])
def test_requests_are_added_up_over_what_is_not_shown(query):
    """A request has a task and an engine, so without `sum` a layer would have several lines."""
    assert re.fullmatch(r"sum by \((layer|layer, task)\) \(rate\(vllm:vtw_requests_total\{.*\]\)\)", query)


def test_the_alert():
    (rule,) = alerts()
    assert rule["alert"] == "VisualTokensLeaveTooEarly"
    assert rule["for"] == "30m"
    by = "sum by (model_name, layer, task)"
    changed, greedy = (
        f"{by} (increase(vllm:vtw_guard_{name}_tokens_total[6h]))" for name in ("changed", "greedy")
    )
    assert " ".join(rule["expr"].split()) == f"{changed} / {greedy} > 0.02 and {greedy} >= 500"
    for text in rule["annotations"].values():
        assert text.count("{{ with ") == text.count("{{ end }}") == 1
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= {"model_name", "layer", "task"}
    assert {"summary", "description"} == rule["annotations"].keys()
    assert "vtw calibrate" in rule["annotations"]["description"]


@needs_promtool
@pytest.mark.parametrize(
    ("command", "file"),
    [("check", ALERTS), ("test", Path(__file__).with_name("alerts_test.yml"))],
    ids=["check", "test"],
)
def test_promtool(command, file):
    """`alerts_test.yml` has when the alert fires, when it does not, and what it says."""
    done = subprocess.run(["promtool", command, "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_kubernetes_gets_the_same_dashboard_and_alerts():
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (dashboard,) = kustomization["configMapGenerator"]
    assert dashboard["files"] == ["dashboard.json"]
    assert kustomization["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    (name,) = kustomization["resources"]
    rule = yaml.safe_load((FOLDER / name).read_text())
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
