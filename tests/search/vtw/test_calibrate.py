# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate` on the trained model: what it chooses, writes and refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.quality.calibration import QUALITY, table
from benchmarks.quality.model import CHECKPOINT
from benchmarks.quality.tasks import TASKS
from benchmarks.small_llava import SmallLlava
from tests.search.command import SAMPLES, calibrate, found
from vllm_vtw.commands.search_setup import values_of_layer
from vllm_vtw.config import ModelShape, VTWConfig
from vllm_vtw.policy import Policy

RESULTS = QUALITY.with_name("calibration.json")
MODEL = ModelShape("llava", "llama", 12, 128)


def test_the_first_token_criterion_does_not_see_that_reading_fails(done):
    out, ended = done
    assert ended.status == 0, ended.err
    result = found(out)
    assert result["layer"] == {"answer": 11, "first-token": 10}
    at_10 = result["layers"].index(10)
    assert result["curves"]["ocr"]["token_change"][at_10] > 0.01
    assert result["curves"]["ocr"]["answer_change"][at_10] >= 1 / 8
    for task in TASKS:
        assert result["tasks"][task]["samples"] == SAMPLES // len(TASKS)
        assert result["tasks"][task]["as_expected"] >= SAMPLES // len(TASKS) - 1
        assert result["curves"][task]["answer_change"][-1] == 0
    lines = {line[:34].strip(): line[34:].split() for line in ended.out.splitlines()}
    assert lines["K, of 12 layers"] == ["11", "10"]
    changed = [f"{result['curves']['ocr']['token_change'][at]:.1%}" for at in (at_10 + 1, at_10)]
    assert lines["ocr: tokens changed"] == changed
    assert "Too few answer tokens" in ended.out


def test_the_policy_file_is_what_the_engine_takes_and_says_how_it_was_made(done, data):
    out, ended = done
    file = out / "policy.json"
    config = VTWConfig.parse({"policy": str(file)}, MODEL, prefix_caching=True)
    assert config.policy == Policy.withdraw_at(11, 12)
    assert f'\'{{"vtw": {{"policy": "{file}"}}}}\'' in ended.out
    made = json.loads(file.read_text())["calibration"]
    assert made["criterion"] == "answer"
    assert made["made"]["samples"] == SAMPLES
    assert made["made"]["versions"].keys() == {"vllm-vtw", "torch", "transformers"}
    assert re.fullmatch("[0-9a-f]{64}", made["made"]["data_sha256"])
    assert made["curves"].keys() == set(TASKS)


def test_sixteen_bits_choose_the_same(done, data, tmp_path):
    assert calibrate(data, tmp_path, "--dtype=bfloat16", "--layers=9-11").status == 0
    result, whole = found(tmp_path), found(done[0])
    assert result["made"]["dtype"] == "bfloat16"
    assert result["layer"] == whole["layer"]
    for half, full in zip(result["first_token_kl"], whole["first_token_kl"][-3:], strict=True):
        assert abs(half - full) < 0.003
    assert result["first_token_kl"] != whole["first_token_kl"][-3:]


class Loads(HTMLParser):
    """What a page would fetch, and how many pictures it has inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        outside = [value for name, value in attrs if name in ("src", "xlink:href") and value]
        self.fetched += [value for value in outside if not value.startswith("#")]


def test_the_report_stands_alone(done):
    out, _ = done
    page = (out / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert loads.tags.count("svg") == 4
    assert not loads.fetched
    assert not {"script", "link", "img"} & set(loads.tags)
    assert "USER: &lt;image&gt;" in page
    rows = re.findall(r'<tr class="([a-z-]*)">\s*<td>(\d+)</td>', page)
    assert [row for row in rows if row[0]] == [("first-token", "10"), ("answer", "11")]
    assert [int(layer) for _, layer in rows] == list(range(5, 12))


def test_answers_are_cut_only_where_they_did_not_end(data, tmp_path):
    ended = calibrate(data, tmp_path, "--limit=12", "--layers=11", "--max-tokens=2")
    assert ended.status == 0
    assert {task: count["cut"] for task, count in found(tmp_path)["tasks"].items()} == {
        **dict.fromkeys(("presence", "attribute", "counting", "relation"), 0),
        **dict.fromkeys(("ocr", "caption"), 2),
    }
    assert "Answers cut at --max-tokens 2: caption (2 of 2), ocr (2 of 2)." in ended.out


def test_without_a_k_there_is_no_policy(data, tmp_path):
    options = ("--limit", "12", "--layers", "1-6")
    assert calibrate(data, tmp_path, *options, "--max-token-change=1", "--max-answer-kl=99").status == 0
    assert (tmp_path / "policy.json").exists()
    ended = calibrate(data, tmp_path, *options, "--resume", "--json")
    assert ended.status == 1
    assert json.loads(ended.out)["layer"] == {"answer": None, "first-token": None}
    assert not (tmp_path / "policy.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert "No K that was measured satisfies the answer criterion" in page
    assert re.search(
        r"K = 6, the largest measured: attribute: [1-9][0-9.]*% of tokens changed, mean KL [0-9.]+ nats; cap",
        page,
    )
    ended = calibrate(data, tmp_path, *options, "--resume", "--criterion=first-token")
    assert re.search(r"K = 6, the largest measured: mean KL [0-9.]+ nats .*\(--eta allows 0.003\)", ended.out)
    assert "prefill work" not in ended.out, "without a K, the table has no rows of what it costs"
    chosen = calibrate(data, tmp_path, *options, "--resume", "--criterion=first-token", "--eta=50")
    assert chosen.status == 0
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["stages"] == [{"layer": 5, "keep": 0.0}]
    assert content["calibration"]["criterion"] == "first-token"


def test_bad_samples_are_told_and_skipped(data, tmp_path):
    lines = data.read_text().splitlines()[:10]
    lines[2] = "{"
    lines[4] = json.dumps({"image": "nowhere.png", "prompt": "What?", "task": "<b>"})
    lines[6] = json.dumps({"image": "0.png", "prompt": "<image><image> What?"})
    lines[7] = json.dumps({"image": "0.png", "prompt": "many words " * 2000})
    for name in ("0.png", "1.png", "3.png", "5.png", "8.png", "9.png"):
        (tmp_path / name).write_bytes((data.parent / name).read_bytes())
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    ended = calibrate(file, tmp_path / "out")
    assert ended.status == 2
    assert "data.jsonl has 6 good samples: at least 8 are needed" in ended.err
    file.write_text("\n".join([*lines, lines[0], lines[0]]))
    for options in ((), ("--resume", "--max-token-change=0.5")):
        ended = calibrate(file, tmp_path / "more", *options)
        assert ended.status == 0
        page = unescape((tmp_path / "more" / "report.html").read_text())
        for said in (
            "line 3: not JSON",
            "line 5: image 'nowhere.png': there is no such file",
            "line 7: the prompt has <image> 2 times, and the number of images is 1",
            "line 8: a prompt of",
        ):
            assert f"skipped: {said}" in ended.err
            assert said in page
        assert "No good sample was drawn of these tasks: <b>, all." in ended.out
        assert "No good sample was drawn of these tasks: <b>, all." in page
        assert found(tmp_path / "more")["made"]["samples"] == 8


def test_a_model_of_the_hub_tasks_of_any_name_and_a_locale_without_them(data, tmp_path):
    """In a process of its own: what libraries and the interpreter read at their start."""
    names = ["price $\\frac$", "_hidden", "Zählen 数", "<i>"]
    lines = [json.loads(line) for line in data.read_text().splitlines()[:8]]
    for number, line in enumerate(lines):
        line |= {"task": names[number % 4], "image": str(data.parent / line["image"])}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    commit, repository = "0123456789" * 4, tmp_path / "hub" / "models--some--llava"
    shutil.copytree(CHECKPOINT, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; sys.modules['vllm'] = None; from vllm_vtw.commands.cli import main; main()"
    options = ["calibrate", "some/llava", f"--data={file}", f"--out={tmp_path}", "--limit=8", "--layers=4,11"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--json"],
        env=os.environ | settings | ascii_only,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    assert result["made"]["revision"] == commit
    assert result["tasks"].keys() == set(names)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in names:
        assert page.count(name) + page.count(escape(name)) >= 4  # in both plots and both tables
    said = "As published, the first-token criterion considers every K from 5 on; here it considered 11."
    assert said in result["notes"]


def test_no_task_is_left_out_for_a_small_limit(data, tmp_path):
    lines = [
        json.loads(line) | {"task": str(number)} for number, line in enumerate(data.read_text().splitlines())
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert f"{SAMPLES} tasks" in calibrate(file, tmp_path / "out", f"--limit={SAMPLES - 1}").err


def test_logits_that_are_not_finite_are_told(data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    weights = load_file(model / "model.safetensors")
    weights["language_model.lm_head.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ended = calibrate(data, tmp_path / "out", "--dtype=float16", model=model)
    assert ended.status == 2
    assert "logits are not finite in torch.float16: choose another --dtype" in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit=7"], "--limit 7: has to be at least 8"),
        (["--limit=0"], "'0' is not a whole number of at least 1"),
        (["--eta=-1"], "'-1' is not a number of at least 0"),
        (["--max-token-change=nan"], "'nan' is not a number of at least 0"),
        (["--max-token-change=5"], "'5' is not a share, a number from 0 to 1"),
        (["--layers=1-12"], "1-12 is not within 1-11, as the model has 12 layers"),
        (["--layers=9,7-5"], "7-5 is not within 1-11"),
        (["--layers=a"], "has to be like 8-20 or 8,12,16"),
        (["--layers=5-"], "has to be like 8-20 or 8,12,16"),
        (["--device=toaster"], "--device toaster"),
        (["--prompt=What?"], "--prompt is for a folder of images"),
    ],
)
def test_wrong_options_are_told(data, tmp_path, options, said):
    ended = calibrate(data, tmp_path / "out", *options)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_calibrated_is_told(data, tmp_path):
    assert "No such file" in calibrate(tmp_path / "nowhere", tmp_path).err
    assert "no such file or folder" in calibrate(data, tmp_path, model=tmp_path / "nowhere").err
    (tmp_path / "few").mkdir()
    few = calibrate(tmp_path / "few", tmp_path, "--prompt=a")
    assert "has 0 good samples: at least 8 are needed" in few.err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    assert "does not support models of type 'paligemma'" in calibrate(data, tmp_path, model=other).err


def test_a_llava_next_is_calibrated(data, tmp_path):
    model = SmallLlava(layers=6, image_side=3, backbone="qwen2", model_type="llava_next").save(
        tmp_path / "next"
    )
    loose = ("--max-token-change=1", "--max-answer-kl=99", "--max-tokens=4", "--limit=8", "--prompt=What?")
    ended = calibrate(data.parent, tmp_path / "out", *loose, model=model)
    assert ended.status == 0
    assert (tmp_path / "out" / "policy.json").exists()
    assert f"vllm serve {model} --model-impl vtw" in ended.out
    assert found(tmp_path / "out")["tokens_per_request"]["visual"] > 9


def test_values_of_layer():
    shape = ModelShape("qwen3_vl", "qwen3_vl_text", 8, 64)
    assert values_of_layer(None, shape) == [5, 6, 7]
    assert values_of_layer(None, replace(shape, num_hidden_layers=4)) == [3]
    assert values_of_layer("7,2-4,3", shape) == [2, 3, 4, 7]
    with_deepstack = replace(shape, first_layer=6)
    assert values_of_layer(None, with_deepstack) == [6, 7]
    with pytest.raises(
        ValueError, match=r"5-7 is not within 6-7, as the model has 8 layers\. The model adds"
    ):
        values_of_layer("5-7", with_deepstack)


def test_the_documentation_says_what_was_calibrated():
    measured = json.loads(RESULTS.with_suffix(".json").read_text())
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    assert measured["weights"] == hashlib.sha256(weights).hexdigest()
    assert measured["samples"] == 64
    assert max(result["seconds"] for result in measured["results"].values()) < 180
    accuracy = {
        result["layer"]: result["engine"]["right"] for result in json.loads(QUALITY.read_text())["results"]
    }
    shown = table(measured["results"], accuracy)
    assert shown == RESULTS.with_suffix(".md").read_text().strip()
    page = (RESULTS.parents[2] / "docs/choosing-a-layer.md").read_text()
    assert shown in page
    cost = json.loads(RESULTS.with_name("cpu-calibration-cost.json").read_text())
    said = re.findall(r"took 1/([0-9.]+) of", page)
    assert said == [f"{cost[name]:.1f}" for name in ("plain_over_first_token", "plain_over_whole_answer")]
    assert cost["plain_over_first_token"] >= 5
    assert cost["first_token_kl"]["largest_difference"] < 1e-5 < cost["first_token_kl"]["smallest"]
    chosen = measured["results"]["all tasks"]["layer"]
    lost = {
        criterion: max(accuracy[12][task] - accuracy[layer][task] for task in TASKS)
        for criterion, layer in chosen.items()
    }
    assert lost["answer"] <= 0.01
    assert lost["first-token"] >= 0.1
