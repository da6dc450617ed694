# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw gsearch` and `vtw psigmoid` on the trained model."""

import json
import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.quality.model import LAYERS
from tests.search.command import searched
from vllm_vtw.policy import Policy
from vllm_vtw.search.journal import Journal
from vllm_vtw.search.schedules.psigmoid import sigmoid


def result_of(out: Path) -> dict[str, Any]:
    """Without what is of its run alone."""
    result = json.loads((out / "result.json").read_text())
    del result["made"]["when"]
    return result


def policy_of(out: Path) -> Policy:
    content = json.loads((out / "policy.json").read_text())
    return Policy.from_json(content, content["model"])


def test_g_search_finds_what_each_layer_needs(gsearched):
    out, ended = gsearched
    assert ended.status == 0, ended.err
    result, policy = result_of(out), policy_of(out)
    keeps = result["keeps"]
    assert (len(keeps), keeps[:2]) == (LAYERS, [1.0, 1.0])
    assert all(later <= earlier for earlier, later in pairwise(keeps))
    assert keeps[-1] < 1
    assert len(policy.stages) < 4
    found = result["policies"]["gsearch"]
    assert found["stages"] == [{"layer": stage.layer, "keep": stage.keep} for stage in policy.stages]
    assert 0 < found["prefill_flops_share"] < 1
    for curve in found["curves"].values():
        assert curve["mean_kl"] <= 0.1
        assert curve["token_change"] <= 0.05
    for name, other in result["policies"].items():
        if "published" not in name:
            assert other["prefill_flops_share"] <= found["prefill_flops_share"]


def test_people_read_the_same(gsearched):
    out, ended = gsearched
    page = (out / "report.html").read_text()
    result = result_of(out)
    found = result["policies"]["gsearch"]
    assert f"<td>samples_sha256</td><td>{result['made']['samples_sha256']}</td>" in page
    share = f"{100 * found['prefill_flops_share']:.1f}"
    assert page.count("<svg") == 3
    assert f"<td>{share}</td>" in page
    assert re.search(rf"^G-Search +{share} ", ended.out, re.M)
    assert f"Policy file: {out / 'policy.json'}" in ended.out
    assert "vllm serve" in ended.out
    assert "vllm serve" in page
    budget = "a mean KL of at most 0.1 nats, and at most 0.05 of the tokens changed"
    assert budget in page
    assert budget in ended.out
    assert json.loads((out / "policy.json").read_text())["search"]["method"] == "gsearch"


def test_ctrl_c_keeps_the_layers_that_were_found(gsearched, data, tmp_path):
    add = Journal.add

    def interrupted(self, line):
        add(self, line)
        if len(self.found) == 7:
            signal.raise_signal(signal.SIGINT)

    options = ("--max-token-change=0.05", "--max-answer-kl=0.1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with patch.object(Journal, "add", interrupted):
            ended = searched("gsearch", data, tmp_path, *options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == 130
    assert "--resume to continue with the layers or trials" in ended.err
    again = searched("gsearch", data, tmp_path, *options)
    assert (again.status, "go on with --resume, or give another --out" in again.err) == (2, True)
    other = searched("gsearch", data, tmp_path, "--max-token-change=0.06", "--resume")
    assert (other.status, "was made with another value of max_" in other.err) == (2, True)
    assert searched("gsearch", data, tmp_path, *options, "--resume").status == 0
    assert result_of(tmp_path) == result_of(gsearched[0])


def test_p_sigmoid_spends_its_budget_and_begins_where_it_stopped(data, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    options = ("--budget=0.7", "--trials=5")
    assert searched("psigmoid", data, once, *options).status == 0
    result = result_of(once)
    found = result["policies"]["psigmoid"]
    assert 0.65 < found["prefill_flops_share"] <= 0.7
    assert len(policy_of(once).stages) < 4
    made = result["made"]
    assert result["keeps"] == sigmoid(made["k"], made["m"], made["r_max"], range(2, LAYERS))
    again = searched("psigmoid", data, once, *options)
    assert (again.status, "holds results (P-Sigmoid): go on with --resume" in again.err) == (2, True)
    for resume in ((), ("--resume",)):
        other = searched("gsearch", data, once, *resume)
        assert (other.status, "results of another search (psigmoid.jsonl): give" in other.err) == (2, True)
    nothing = searched("psigmoid", data, twice, *options, "--resume")
    assert (nothing.status, "--resume: there is no" in nothing.err) == (2, True)
    other = searched("psigmoid", data, once, "--budget=0.6", "--resume")
    assert (other.status, "was made with another value of budget (0.7, now 0.6)" in other.err) == (2, True)
    assert "answering" not in other.err
    # Fewer trials first, then the rest: the same.
    assert searched("psigmoid", data, twice, "--budget=0.7", "--trials=2").status == 0
    assert searched("psigmoid", data, twice, *options, "--resume").status == 0
    assert result_of(twice) == result


def test_g_search_by_image_begins_before_the_decoder(data, tmp_path):
    budget = ("--max-token-change=0.5", "--max-answer-kl=3")
    ended = searched("gsearch", data, tmp_path, "--ranking=uniform", *budget)
    assert ended.status == 0, ended.err
    result, policy = result_of(tmp_path), policy_of(tmp_path)
    assert result["keeps"][0] < 1
    assert policy.stages[0].layer == 0
    assert policy.ranking == result["policies"]["gsearch"]["ranking"] == "uniform"
    assert {name.split(",")[0] for name in result["policies"]} >= {"gsearch", "random", "uniform"}
    other = searched("gsearch", data, tmp_path, "--ranking=random", *budget, "--resume")
    assert (other.status, "was made with another value of ranking" in other.err) == (2, True)


def test_p_sigmoid_by_another_ranking(data, tmp_path):
    for ranking in ("diversity", "variation"):
        out = tmp_path / ranking
        options = (f"--ranking={ranking}", "--budget=0.5", "--trials=2")
        assert searched("psigmoid", data, out, *options).status == 0
        policy = policy_of(out)
        assert policy.ranking == ranking or not any(stage.keep for stage in policy.stages)
        first = 0 if ranking == "diversity" else 2
        assert result_of(out)["keeps"][:first] == [1.0] * first


def test_p_sigmoid_on_a_memory_budget(data, tmp_path):
    assert searched("psigmoid", data, tmp_path, "--kv-budget=0.8", "--trials=4").status == 0
    result = result_of(tmp_path)
    found, *others = (policy for name, policy in result["policies"].items() if "published" not in name)
    assert 0.72 < found["kv_share"] <= 0.8
    assert all(other["kv_share"] <= found["kv_share"] for other in others)
    page = (tmp_path / "report.html").read_text()
    assert "take no more KV memory" in page
    assert "Budget: 0.8 of stock vLLM&#39;s KV memory." in page


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        ("gsearch", "--max-answer-kl=0", "nothing can be withdrawn, so there is no policy file: raise"),
        ("psigmoid", "--budget=1", "allows all visual tokens, so there is no policy file: lower"),
    ],
)
def test_where_nothing_is_withdrawn_there_is_no_policy_file(data, tmp_path, method, option, said):
    (tmp_path / "policy.json").write_text("of another search")
    more = ["--trials=1"] if method == "psigmoid" else ["--max-token-change=0"]
    ended = searched(method, data, tmp_path, option, *more)
    assert (ended.status, said in ended.out) == (1, True), ended
    assert not (tmp_path / "policy.json").exists()
    assert said in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("psigmoid", ["--budget=0.01"], "--budget 0.01: on this data, no schedule takes less than 0.3"),
        ("psigmoid", [], "one of the arguments --budget --kv-budget is required"),
        ("psigmoid", ["--budget=0.5", "--kv-budget=0.5"], "not allowed with argument"),
        ("psigmoid", ["--budget=1.5"], "'1.5' is not a share, a number from 0 to 1"),
        ("gsearch", ["--max-stages=1"], "has to be at least 2, as the first layers get all visual tokens"),
        ("gsearch", ["--seed=-1"], "'-1' is not a whole number from 0 to 4294967295"),
        ("gsearch", ["--limit=7"], "--limit 7: has to be at least 8"),
    ],
)
def test_what_cannot_be_searched_is_said(data, tmp_path, method, options, said):
    ended = searched(
        method, data, tmp_path, "--trials=2" if method == "psigmoid" else "--max-tokens=8", *options
    )
    assert (ended.status, said in ended.err) == (2, True), ended.err
