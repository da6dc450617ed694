# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate --per-task` on the trained model: what it chooses, writes, shows and refuses."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.quality.tasks import TASKS
from tests.search.command import calibrate, found
from vllm_vtw.policy import Policy
from vllm_vtw.search.vtw.calibration_journal import CalibrationJournal

MODEL = {"model_type": "llava", "num_hidden_layers": 12, "hidden_size": 128}
FEW = "--limit=12"


@pytest.fixture
def out(done: Any, tmp_path: Path) -> Iterator[Path]:
    """A folder with the calibration on all samples, in which nothing may be measured again."""
    folder = tmp_path / "out"
    shutil.copytree(done[0], folder)
    with patch.object(CalibrationJournal, "add", side_effect=AssertionError("measured again")):
        yield folder


def policy_of(out: Path) -> Policy:
    return Policy.read(out / "policy.json", MODEL)


def first_layers(result: dict[str, Any], max_answer_kl: float, max_token_change: float) -> dict[str, Any]:
    """For each task, the first K within its budgets, by the curves of a result."""
    return {
        task: next(
            (
                layer
                for layer, kl, change in zip(
                    result["layers"], curve["mean_kl"], curve["token_change"], strict=True
                )
                if kl <= max_answer_kl and change <= max_token_change
            ),
            None,
        )
        for task, curve in result["curves"].items()
    }


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the terminal's table, by their names."""
    return {line[:34].strip(): line[34:].split() for line in text.splitlines() if line[34:].strip()}


def test_each_task_gets_a_layer_of_its_own(done, out, data):
    ended = calibrate(data, out, "--resume", "--per-task", "--max-stages=9")
    assert ended.status == 0, ended.err
    result = found(out)
    assert result["policies"] == {}, "one K for all is not what is served"
    of_one_layer = found(done[0]) | {"policies": {}}
    assert {key: value for key, value in result.items() if key != "per_task"} == of_one_layer
    per_task = result["per_task"]
    own = {name: task["own"] for name, task in per_task["tasks"].items()}
    assert own == first_layers(result, 0.02, 0.01)
    served = {name: task["layer"] for name, task in per_task["tasks"].items()}
    assert served == own  # Groups waste too little here for another layer to be cheaper.
    policy = policy_of(out)
    assert policy.tasks == served
    assert policy.layer == per_task["layer"] == max(own.values()) == 11
    assert [(stage.layer, stage.keep) for stage in policy.stages] == [(k, 0) for k in sorted({*own.values()})]
    assert json.loads((out / "policy.json").read_text())["calibration"]["per_task"] == per_task
    assert per_task["single"]["layer"] == 11
    at_11 = result["layers"].index(11)
    assert per_task["single"]["kv_share"] == pytest.approx(result["kv_share"][at_11])
    for name in ("kv_share", "prefill_flops_share"):
        assert per_task["all"][name] < per_task["single"][name] - 0.1
        shares = [task[name] for task in per_task["tasks"].values()]
        assert min(shares) < per_task["all"][name] < max(shares)


def test_a_calibration_goes_from_tasks_to_one_k_and_back(done, out, data):
    assert calibrate(data, out, "--resume", "--per-task").status == 0
    assert calibrate(data, out, "--resume").status == 0
    assert found(out) == found(done[0])
    assert policy_of(out) == Policy.withdraw_at(11, 12)
    assert json.loads((out / "policy.json").read_text())["calibration"].keys() == {
        *("criterion", "made", "budget", "layer", "tasks", "layers", "first_token_kl", "curves")
    }


def test_few_stages_move_tasks_to_deeper_layers_and_all_reports_say_so(out, data):
    ended = calibrate(data, out, "--resume", "--per-task", "--max-stages=2")
    assert ended.status == 0
    per_task = found(out)["per_task"]
    served = {name: task["layer"] for name, task in per_task["tasks"].items()}
    assert len({*served.values()} - {12}) == len(policy_of(out).stages) == 2
    assert all(served[name] >= task["own"] for name, task in per_task["tasks"].items())
    assert any(served[name] > task["own"] for name, task in per_task["tasks"].items())
    lines = rows(ended.out)
    page = (out / "report.html").read_text()
    for name, task in per_task["tasks"].items():
        layer = "none" if task["layer"] == 12 else str(task["layer"])
        shares = [100 * task["kv_share"], 100 * task["prefill_flops_share"]]
        assert lines[name] == [str(task["own"]), layer, *(f"{share:.1f}%" for share in shares)]
        changed = [100 * task["token_change"], 100 * task["answer_change"]]
        numbers = [f"{share:.1f}" for share in shares + changed]
        cells = [name, f"<b>{layer}</b>", *numbers, str(task["own"]), "8"]
        assert re.search(r"\s*".join(f"<td>{re.escape(cell)}</td>" for cell in cells), page)
    everything, single = per_task["all"], per_task["single"]
    shares = [f"{of[key]:.1%}" for of in (everything, single) for key in ("kv_share", "prefill_flops_share")]
    assert lines["all samples"] == shares[:2]
    assert lines["all samples, with one K"] == ["11", *shares[2:]]
    assert f"<td>all samples</td><td></td>\n<td>{shares[0][:-1]}</td>" in page
    assert f"<td>11</td><td>{shares[2][:-1]}</td>\n<td>{shares[3][:-1]}</td>" in page
    assert "by the answer criterion on each task" in ended.out


def test_a_task_for_which_a_stage_is_too_much_keeps_its_visual_tokens(out, data):
    budgets = ("--max-token-change=0.05", "--max-answer-kl=0.1")
    ended = calibrate(data, out, "--resume", "--per-task", "--max-stages=1", *budgets)
    assert ended.status == 0
    tasks = found(out)["per_task"]["tasks"]
    assert (tasks["ocr"]["own"], tasks["ocr"]["layer"]) == (11, 12)
    assert policy_of(out).layer == policy_of(out).tasks["ocr"] == 12
    said = (
        "Requests of these tasks keep their visual tokens, because a layer for them would cost more than it "
        "saves, or need a larger --max-stages: ocr."
    )
    assert said in ended.out
    assert said in (out / "report.html").read_text()


def test_nothing_is_withdrawn_from_a_task_without_a_layer(data, tmp_path):
    options = ("--per-task", FEW, "--layers=5-10")
    ended = calibrate(data, tmp_path, *options, "--max-token-change=0")
    result = found(tmp_path)
    own = first_layers(result, 0.02, 0)
    without = [task for task, layer in own.items() if layer is None]
    assert "ocr" in without
    assert len(without) < len(TASKS)
    assert ended.status == 0
    assert result["layer"]["answer"] is result["per_task"]["single"] is None
    policy = policy_of(tmp_path)
    assert policy.layer == 12
    assert policy.stages[-1].layer <= 10
    page = (tmp_path / "report.html").read_text()
    said = (
        "No K that was measured satisfies the answer criterion on these tasks, so nothing is withdrawn from "
        f"their requests: {', '.join(without)}. To withdraw something, measure larger values with --layers, "
        "raise --max-answer-kl or --max-token-change."
    )
    assert said in ended.out
    assert said in page
    lines = rows(ended.out)
    for task in without:
        assert policy.tasks[task] == 12
        assert lines[task][:3] == ["none", "none", f"{result['per_task']['tasks'][task]['kv_share']:.1%}"]
    assert lines["all samples, with one K"] == ["none"]
    assert "Nothing is withdrawn from requests that name no task, because there is a task" in page
    assert calibrate(data, tmp_path, *options, "--resume", "--max-answer-kl=0").status == 1
    assert not (tmp_path / "policy.json").exists()
    assert {task["layer"] for task in found(tmp_path)["per_task"]["tasks"].values()} == {12}
    said = "No K that was measured satisfies the answer criterion on any task, so there is no policy file"
    assert said in (tmp_path / "report.html").read_text()


def test_the_first_token_criterion_chooses_for_each_task(done, out, data):
    options = ("--per-task", "--criterion=first-token", "--eta=0.01")
    assert calibrate(data, out, "--resume", *options).status == 0
    measured = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()[1:]]
    layers = found(out)["layers"]
    for name, task in found(out)["per_task"]["tasks"].items():
        kls = [
            [difference["first_token_kl"] for difference in sample["differences"]]
            for sample in measured
            if sample["task"] == name
        ]
        means = [sum(at) / len(at) for at in zip(*kls, strict=True)]
        assert task["own"] == next(layer for layer, kl in zip(layers, means, strict=True) if kl <= 0.01)
    assert len(policy_of(out).stages) > 1


def test_samples_without_a_task_have_the_default_layer(data, tmp_path):
    """A task that is called "all" is one like any other."""
    names = {"counting": "all", "ocr": None, "presence": ""}
    lines = [json.loads(line) for line in data.read_text().splitlines()[:12]]
    for line in lines:
        line |= {"task": names.get(line["task"], line["task"]), "image": str(data.parent / line["image"])}
    del next(line for line in lines if line["task"] is None)["task"]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    ended = calibrate(file, tmp_path, "--per-task", "--max-stages=9", FEW)
    assert ended.status == 0
    per_task = found(tmp_path)["per_task"]
    assert {name: task["samples"] for name, task in per_task["tasks"].items()} == {
        **dict.fromkeys(("all", "attribute", "caption", "relation"), 2),
        "": 4,
    }
    assert per_task["tasks"]["all"]["own"] == 5
    assert per_task["tasks"][""]["own"] == 11
    policy = policy_of(tmp_path)
    assert policy.tasks.keys() == {"all", "attribute", "caption", "relation"}
    assert policy.layer == per_task["tasks"][""]["layer"] == per_task["layer"] == 11
    assert max(policy.tasks.values()) < 11
    assert "samples without a task" in rows(ended.out)
    assert "<td>samples without a task</td><td><b>11</b></td>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (None, "--per-task: no sample of --data has a 'task'"),
        ("", "--per-task: no sample of --data has a 'task'"),
        ("a" * 65, f"--per-task: task '{'a' * 65}': a name has to have from 1 to 64 characters"),
        ("a\nb", r"--per-task: task 'a\nb': a name has to have from 1 to 64 characters, and none that"),
    ],
)
def test_data_without_tasks_or_with_wrong_names_is_refused(data, tmp_path, task, said):
    lines = [json.loads(line) for line in data.read_text().splitlines()[:8]]
    file = data.with_name("tasks.jsonl")
    file.write_text("\n".join(json.dumps(line | {"task": task}) for line in lines))
    ended = calibrate(file, tmp_path / "out", "--per-task")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.splitlines()[-1].startswith(f"vtw calibrate: error: {said}")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_has_no_tasks(data, tmp_path):
    ended = calibrate(data.parent, tmp_path / "out", "--per-task", "--prompt=What?")
    assert ended.status == 2
    assert "--per-task: no sample of --data has a 'task'" in ended.err


def test_a_number_of_stages_is_at_least_one(data, tmp_path):
    ended = calibrate(data, tmp_path / "out", "--per-task", "--max-stages=0")
    assert (ended.status, ended.out) == (2, "")
    assert "'0' is not a whole number of at least 1" in ended.err
