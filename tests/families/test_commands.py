# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Whole searches on families other than LLaVA-1.5, with images of several sizes and videos in the data."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.engine.engines import running
from tests.families.requests import (
    FAMILIES,
    FRAMES,
    GREEDY,
    SQUARE,
    WIDE,
    asks,
    assert_answers,
    engine,
    noise,
    slow,
)
from tests.search.command import vtw

LOOSE = ("--max-answer-kl", "100", "--max-token-change", "1")
"""Budgets that every layer is within. Random weights say nothing that could be kept."""
COMMANDS = {
    "calibrate": ("calibrate", *LOOSE),
    "gsearch": ("gsearch", *LOOSE),
    "psigmoid": ("psigmoid", "--budget", "0.6", "--trials", "4"),
    "dyvte": ("dyvte", "train", "--layers", "2,4", "--epochs", "2"),
}
OTHERS = ("internvl", "mistral3", "smolvlm", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def data(tmp_path, request) -> Path:
    """Twelve samples with one or two images, and two with a video, if the family takes videos."""
    family, lines = FAMILIES[request.param], []
    small = Image.fromarray(noise(9, 60, 90, 3))
    for number, images in enumerate(
        [(WIDE,), (SQUARE,), (small,), (WIDE, small), (SQUARE, WIDE), (small,)] * 2
    ):
        names = [f"{number}-{image}.png" for image in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(tmp_path / name)
        places = re.sub(r"<\|image_pad\|>|\[IMG\]|<IMG_CONTEXT>", "<image>", family.image) * len(names)
        lines.append({"images": names, "prompt": f"USER: {places}\nWhat is number {number}? ASSISTANT:"})
    if family.video:
        names = [f"frame-{number}.png" for number in range(len(FRAMES))]
        for name, frame in zip(names, FRAMES, strict=True):
            Image.fromarray(frame).save(tmp_path / name)
        asked = ("What happens?", "What comes first?")
        shown = {"video": names, "task": "video"}
        place = re.sub(r"<\|video_pad\|>", "<video>", family.video)
        lines += [shown | {"prompt": f"USER: {place}\n{question} ASSISTANT:"} for question in asked]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    "command", ["calibrate", "dyvte", *(pytest.param(name, marks=slow) for name in ("gsearch", "psigmoid"))]
)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("llava_onevision", "llava_onevision"),
        *(pytest.param(name, name, marks=slow) for name in OTHERS),
    ],
    indirect=["data"],
)
def test_a_search_makes_a_policy_that_is_served(family_checkpoint, oracle, data, tmp_path, name, command):
    family, folder, out = FAMILIES[name], family_checkpoint(name), tmp_path / "out"
    shared = ("--data", str(data), "--out", str(out), "--max-tokens", "4")
    ended = vtw(*COMMANDS[command], str(folder), *shared)
    assert ended.status == 0, ended.err
    assert "skipped" not in ended.err
    policy = json.loads((out / "policy.json").read_text())
    assert policy["stages"]
    if family.video and command != "dyvte":
        assert "video" in json.loads((out / "result.json").read_text())["tasks"]
    with running(folder, {"policy": str(out / "policy.json")}, **engine(family)) as llm:
        outputs = llm.generate([ask.to_vllm() for ask in asks(family).values()], GREEDY, use_tqdm=False)
    if command == "calibrate":
        (stage,) = policy["stages"]
        assert_answers(oracle(name), family, outputs, stage["layer"], 1)
