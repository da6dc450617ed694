# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What `vtw calibrate` keeps, goes on with, and refuses to go on with."""

import json
import shutil
import signal
from unittest.mock import patch

from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.quality.model import CHECKPOINT
from tests.search.command import SAMPLES, calibrate, found
from vllm_vtw.search.vtw.calibration_journal import CalibrationJournal


def test_ctrl_c_keeps_what_was_done_and_resume_goes_on(done, data, tmp_path):
    add = CalibrationJournal.add

    def interrupted(self, measured):
        add(self, measured)
        if len(self.measured) == 10:
            signal.raise_signal(signal.SIGINT)

    # A shell that started the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with patch.object(CalibrationJournal, "add", interrupted):
            ended = calibrate(data, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == 130
    assert f"10 samples are kept in {tmp_path}" in ended.err
    assert not (tmp_path / "policy.json").exists()
    assert calibrate(data, tmp_path).status == 2
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"where": "line 1", "ta')  # as a process that is killed leaves it
    calls = 0

    def counted(self, measured):
        nonlocal calls
        calls += 1
        add(self, measured)

    with patch.object(CalibrationJournal, "add", counted):
        ended = calibrate(data, tmp_path, "--resume")
    assert (ended.status, calls) == (0, SAMPLES - 10)
    assert found(tmp_path) == found(done[0])


def test_resuming_asks_for_more_samples_or_other_budgets_but_not_for_other_data(data, tmp_path):
    options = ("--layers", "8-11", "--limit")
    assert calibrate(data, tmp_path, *options, "12").status == 0
    assert found(tmp_path)["made"]["samples"] == 12
    more = calibrate(data, tmp_path, *options, "18", "--resume", "--max-token-change=1", "--max-answer-kl=9")
    assert more.status == 0
    assert (found(tmp_path)["made"]["samples"], found(tmp_path)["layer"]["answer"]) == (18, 8)
    fewer = calibrate(data, tmp_path, *options, "12", "--resume")
    assert (fewer.status, found(tmp_path)["made"]["samples"]) == (0, 12)
    ended = calibrate(data, tmp_path, *options, "12")
    assert (ended.status, ended.err.splitlines()[-1]) == (
        2,
        f"vtw calibrate: error: {tmp_path} already holds results (calibration): "
        "go on with --resume, or give another --out",
    )
    ended = calibrate(data, tmp_path, "--layers=9-11", "--limit=12", "--resume")
    assert ended.status == 2
    assert "was made with another value of layers ([8, 9, 10, 11], now [9, 10, 11])" in ended.err


def test_another_picture_or_other_weights_are_not_mixed_in(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    file, options = folder / data.name, ("--limit=8", "--layers=9-11")
    assert calibrate(file, tmp_path / "out", *options, model=model).status == 0
    measured = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[1])
    picture = folder / f"{int(measured['where'].split()[1]) - 1}.png"
    kept = picture.read_bytes()
    Image.new("RGB", (96, 96)).save(picture)
    ended = calibrate(file, tmp_path / "out", *options, "--resume", model=model)
    assert ended.status == 2
    assert f"--resume: {measured['where']} had another image, video or prompt" in ended.err
    picture.write_bytes(kept)
    assert calibrate(file, tmp_path / "out", *options, "--resume", model=model).status == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor / 2 for name, tensor in weights.items()}, model / "model.safetensors")
    ended = calibrate(file, tmp_path / "out", *options, "--resume", model=model)
    assert ended.status == 2
    assert "was made with another value of revision: use the same" in ended.err
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for other, name in (("--seed=1", "seed (0, now 1)"), ("--max-tokens=9", "max_tokens (128,")):
        ended = calibrate(file, tmp_path / "out", *options, other, "--resume", model=model)
        assert ended.status == 2
        assert f"was made with another value of {name}" in ended.err
    file.write_text(file.read_text() + "\n")
    ended = calibrate(file, tmp_path / "out", *options, "--resume", model=model)
    assert ended.status == 2
    assert "was made with another value of data_sha256: use the same" in ended.err


def test_a_file_that_is_not_its_own_is_left_alone(data, tmp_path):
    for content in (
        '{"image": "0.png", "prompt": "What?"}\n{"image"',
        "[1]\n[2]\n",
        "",
        '{"format": 1}\n[]\n',
    ):
        (tmp_path / "samples.jsonl").write_text(content)
        for options in ((), ("--resume",)):
            ended = calibrate(data, tmp_path, *options)
            assert ended.status == 2
            assert "samples.jsonl" in ended.err
            assert "give another --out" in ended.err
            assert (tmp_path / "samples.jsonl").read_text() == content
