# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""DyVTE's gates: what they learn from, how they learn, and the commands, on the trained model."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.quality.model import LAYERS
from benchmarks.small_llava import SmallLlava
from tests.search.command import LOOK, TRAIN, dyvte
from tests.search.conftest import load_llava
from tests.search.plain import plain_logits
from tests.search.test_model import PROMPTS, pictures, sample
from vllm_vtw.commands.dyvte import default_layers
from vllm_vtw.gates import leave_margins, load_gates
from vllm_vtw.policy import Policy
from vllm_vtw.search.dyvte.evaluation import exit_stages
from vllm_vtw.search.dyvte.exit_labels import ExitStore, SampleExits, collect_exits, may_leave
from vllm_vtw.search.dyvte.training import TrainingSettings, held_out, train
from vllm_vtw.search.journal import Journal

__all__ = ["pictures"]


def of_answer(*chosen: tuple[int, float]) -> torch.Tensor:
    """Logits by which each token is chosen, with this probability, among two."""
    rows = [[1 - share, share] if token else [share, 1 - share] for token, share in chosen]
    return torch.tensor(rows).log()


def test_tokens_may_leave_where_the_answer_stays_and_is_about_as_likely():
    full, said = of_answer((1, 0.9), (0, 0.9)), [1, 0]
    assert may_leave(full, full, said)
    assert may_leave(full, of_answer((1, 0.88), (0, 0.91)), said)
    assert not may_leave(full, of_answer((1, 0.6), (0, 0.9)), said)
    assert not may_leave(full, of_answer((1, 0.99), (1, 0.51)), said)
    # 3% more than next to nothing is nothing.
    sure = of_answer((1, 1 - 1e-6), (0, 1 - 1e-6))
    assert may_leave(sure, of_answer((1, 1 - 1e-4), (0, 1 - 1e-4)), said)
    # Of a long answer one token in a hundred may change, if it is about as likely.
    tie = of_answer(*[(1, 0.9)] * 149, (1, 0.500001))
    assert may_leave(tie, of_answer(*[(1, 0.9)] * 149, (0, 0.500001)), [1] * 150)


@pytest.mark.parametrize("prompt", ["one", "two", "apart"])
def test_what_gates_read_and_what_leaving_does(pictures, tmp_path, prompt):
    """Against the whole model, run anew for every token, and against what its layers give."""
    layers, tokens = [1, 3, 5], 6
    folder = SmallLlava(layers=6, kv_heads=1, image_side=4).save(tmp_path / "model")
    loaded = load_llava(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    store = ExitStore(tmp_path / "out", {"layers": layers}, 64, with_answers=True, resume=False)
    (seen,) = collect_exits(loaded, [sample(PROMPTS[prompt], pictures)], 8, layers, tokens, store)
    assert isinstance(seen, SampleExits)
    inputs = loaded.encode(sample(PROMPTS[prompt], pictures), tokens).tensors
    last_picture = int((inputs["input_ids"][0] == plain.config.image_token_id).nonzero().max())
    with torch.no_grad():
        states = plain(**inputs, output_hidden_states=True).hidden_states
    for read, layer in zip(store.features([seen])[0], layers, strict=True):
        behind = states[layer][0, last_picture + 1 :]
        wanted = torch.cat([behind[:-1].mean(0), behind[-1]])
        torch.testing.assert_close(torch.from_numpy(read), wanted, atol=1e-4, rtol=1e-4)
    answers = []
    for layer in (*layers, 6):
        said: list[int] = []
        while len(said) < tokens and (not said or said[-1] not in loaded.eos_token_ids):
            said.append(int(plain_logits(plain, inputs, [*said, 0], layer)[-1].argmax()))
        answers.append(loaded.processor.tokenizer.decode(said, skip_special_tokens=True).strip())
    assert seen.answers == answers
    assert len(set(answers)) > 1


def test_a_prompt_without_text_behind_its_picture_is_skipped(pictures, tmp_path):
    loaded = load_llava(SmallLlava(layers=3, image_side=4).save(tmp_path / "model"))
    store = ExitStore(tmp_path / "out", {"layers": [1]}, 64, with_answers=False, resume=False)
    (bad,) = collect_exits(loaded, [sample(PROMPTS["at the end"], pictures)], 8, [1], 4, store)
    assert "gates read the text after the last image" in str(bad)


def separable(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """What two gates read, and labels that a line tells apart."""
    read = np.random.default_rng(3).normal(size=(samples, 2, 16)).astype(np.float32)
    return read, (read[:, :, 2] > read[:, :, 5]).astype(np.int64)


def trained(checkpoint: Path, settings: TrainingSettings, ends_after: int | None = None) -> Any:
    def after(epoch: int) -> None:
        if epoch == ends_after:
            raise KeyboardInterrupt

    return train(*separable(200), settings, checkpoint, {}, torch.device("cpu"), after)


def test_gates_learn_and_go_on_where_they_stopped(tmp_path):
    settings = TrainingSettings(epochs=12, learning_rate=3e-3, batch_size=16, seed=1)
    once = trained(tmp_path / "once.pt", settings)
    assert len(once.curves) == 12
    assert once.curves[-1]["loss"] < [0.3, 0.3]
    assert all(accuracy > 0.85 for accuracy in once.curves[-1]["held_out_accuracy"])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "twice.pt", settings, ends_after=5)
    twice = trained(tmp_path / "twice.pt", settings)
    assert twice.curves == once.curves
    for one, other in zip(once.gates, twice.gates, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())
    # Another training does not go on with it.
    assert trained(tmp_path / "twice.pt", replace(settings, epochs=2)).curves != once.curves[:2]


@pytest.mark.parametrize("tasks", [5, 6, 10])
def test_some_of_every_task_are_held_out_and_some_are_not(tasks):
    """Tasks come by turns."""
    of_task = np.arange(600) % tasks
    out = held_out(600, seed=0)
    assert out.sum() == 120
    assert set(of_task[out]) == set(of_task[~out]) == set(range(tasks))


def test_exits_are_where_the_first_gate_says_so():
    margins = np.array([[1, 0, 0], [-1, 3, 5], [-1, -1, -1], [0, 0.6, 0]], dtype=np.float32)
    assert exit_stages(margins, [0, 0, 0]) == [1, 2, None, 2]
    assert exit_stages(margins, [0.5, 0.5, 0.5]) == [1, 2, None, 2]
    assert exit_stages(margins, [2, 2, 2]) == [None, 2, None, None]


def test_gates_stand_at_every_fourth_layer():
    assert default_layers(32) == [8, 12, 16, 20, 24, 28]
    assert default_layers(2) == [1]
    assert default_layers(8, first_layer=3) == [3, 7]


def without_time(out: Path) -> dict[str, Any]:
    result = json.loads((out / "result.json").read_text())
    del result["made"]["when"]
    return result


def test_training_leaves_gates_that_the_policy_file_names(gates):
    out, ended = gates
    assert ended.status == 0, ended.err
    content = json.loads((out / "policy.json").read_text())
    policy = Policy.from_json(content, content["model"])
    assert [stage.layer for stage in policy.stages] == [4, 9]
    assert policy.gate is not None
    assert policy.gate.thresholds == (0, 0)
    found = load_gates(replace(policy.gate, weights=str(out / policy.gate.weights)), [4, 9], 128)
    assert all(leave_margins(gate, torch.randn(3, 256)).shape == (3,) for gate in found)
    with pytest.raises(ValueError, match="are not for layers"):
        load_gates(replace(policy.gate, weights=str(out / policy.gate.weights)), [4, 8], 128)
    result = without_time(out)
    assert len(result["curves"]) == 3
    assert result["held_out"] == 2
    assert re.search(r"^ +9 .*", ended.out, re.M)
    assert "vllm serve" in ended.out
    modes = {(out / name).stat().st_mode for name in ("gates.safetensors", "policy.json")}
    assert len(modes) == 1, "who may read one may read the other"
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "vllm serve" in page


def test_ctrl_c_keeps_what_was_seen(gates, data, tmp_path):
    add = Journal.add

    def interrupted(self, line):
        add(self, line)
        if len(self.found) == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with patch.object(Journal, "add", interrupted):
            ended = dyvte("train", data, tmp_path, *TRAIN)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.status, "Run the same command with --resume to continue" in ended.err) == (130, True)
    again = dyvte("train", data, tmp_path, *TRAIN)
    assert (again.status, "go on with --resume, or give another --out" in again.err) == (2, True)
    with (tmp_path / "features.f32").open("ab") as file:
        file.write(b"half a row")
    assert dyvte("train", data, tmp_path, *TRAIN, "--resume").status == 0
    assert without_time(tmp_path) == without_time(gates[0])
    name = "gates.safetensors"
    assert (tmp_path / name).read_bytes() == (gates[0] / name).read_bytes()


def test_evaluation_by_threshold(gates, data, tmp_path):
    policy = f"--policy={gates[0] / 'policy.json'}"
    ended = dyvte("eval", data, tmp_path, policy, *LOOK, "--thresholds=-1000,0,1000")
    assert ended.status == 0, ended.err
    rows = {row.pop("way"): row for row in without_time(tmp_path)["rows"]}
    assert list(rows) == [
        *("full model", "VTW, K = 4", "VTW, K = 9"),
        *("gates of the policy", "gates, t = -1000", "gates, t = 0", "gates, t = 1000"),
    ]

    def without_memory(way: str) -> list[dict[str, Any]]:
        told = [rows[way]["all"], *rows[way]["tasks"].values()]
        return [{key: value for key, value in of.items() if key != "kv_share"} for of in told]

    assert without_memory("gates, t = -1000") == without_memory("VTW, K = 4")
    assert without_memory("gates, t = 1000") == without_memory("full model")
    full = rows["full model"]["all"]
    assert (full["same_answer"], full["exit_layer"], full["prefill_flops_share"]) == (1, LAYERS, 1)
    assert full["accuracy"] > rows["VTW, K = 4"]["all"]["accuracy"]
    at_0 = rows["gates, t = 0"]["all"]
    assert rows["gates of the policy"] == rows["gates, t = 0"]
    assert 4 <= at_0["exit_layer"] <= LAYERS
    assert rows["VTW, K = 4"]["all"]["kv_share"] < rows["gates, t = 1000"]["all"]["kv_share"]
    assert re.search(r"^gates, t = 0 .* @ ", ended.out, re.M)
    assert "The gates were trained on this data: on other data they may do worse." in ended.out
    assert (tmp_path / "report.html").read_text().count("<svg") == 3


def test_what_is_wrong_is_said(gates, data, done, tmp_path):
    for command, options, said in (
        ("train", ["--layers=12"], "12 is not within 1-11"),
        ("train", ["--limit=7"], "--limit 7: has to be at least 8"),
        ("eval", [], "the following arguments are required: --policy"),
        ("eval", [f"--policy={done[0] / 'policy.json'}"], "has no gates: `vtw dyvte train` makes them"),
        ("eval", [f"--policy={data}"], "--policy"),
        (
            "eval",
            [f"--policy={gates[0] / 'policy.json'}", "--thresholds=a"],
            "not a list of numbers, as in --thresholds=-1,0,1",
        ),
    ):
        ended = dyvte(command, data, tmp_path, *LOOK, *options)
        assert (ended.status, said in ended.err) == (2, True), ended.err
