# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Answers that mean something: the shipped model's in full, withdrawn at half of its layers, and ranked."""

import json
import sys
from itertools import islice
from unittest.mock import patch

from benchmarks.quality.data import write_data
from benchmarks.quality.evaluate import TIE, answers, own_answer
from benchmarks.quality.model import CHECKPOINT, LAYERS
from benchmarks.quality.schedules import largest_gap
from benchmarks.quality.tasks import TASKS, samples
from tests.engine.engines import running
from vllm_vtw.commands.cli import main

SAMPLES = 12  # of each task


def test_counting_survives_half_of_the_layers_and_reading_does_not(reference, tmp_path):
    """Under the policy of a calibration on counting alone, from half of the layers on."""
    oracle, half = reference(CHECKPOINT), LAYERS // 2
    data = write_data(tmp_path, ["counting"], SAMPLES)
    options = [f"--data={data}", f"--out={tmp_path / 'out'}", f"--layers={half}-{LAYERS - 1}"]
    with patch.object(sys, "argv", ["vtw", "calibrate", str(CHECKPOINT), *options]):
        main()
    policy = str(tmp_path / "out" / "policy.json")
    asked = [sample for task in TASKS for sample in islice(samples("validation", task), SAMPLES)]
    with running(CHECKPOINT, {"policy": policy}) as llm:
        withdrawn = answers(llm, asked)
    full, cut = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for (picture, question), answer in zip(asked, withdrawn, strict=True):
        assert own_answer(oracle, half, picture, answer)[1] < TIE
        said, _ = own_answer(oracle, LAYERS, picture, answer)
        text = oracle.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        full[question.task] += text == question.answer
        cut[question.task] += answer.text == question.answer
    assert min(full.values()) >= SAMPLES - 1, full
    assert cut["counting"] >= SAMPLES - 1, cut
    assert max(cut["ocr"], cut["caption"]) <= 1, cut


def test_a_searched_schedule_is_served_as_it_was_searched(tmp_path):
    """Its stages rank, and the engine's answers are those of the reference under the same stages."""
    data = write_data(tmp_path, list(TASKS), SAMPLES)
    options = [f"--data={data}", f"--out={tmp_path / 'out'}", "--max-tokens=8", "--max-token-change=0.1"]
    with patch.object(sys, "argv", ["vtw", "gsearch", str(CHECKPOINT), *options, "--max-answer-kl=0.3"]):
        main()
    file = tmp_path / "out" / "policy.json"
    stages = {stage["layer"]: stage["keep"] for stage in json.loads(file.read_text())["stages"]}
    assert len(stages) >= 2
    assert any(0 < keep < 1 for keep in stages.values())
    asked = [sample for task in TASKS for sample in islice(samples("validation", task), SAMPLES)]
    with running(CHECKPOINT, {"policy": str(file)}) as llm:
        given = answers(llm, asked)
    assert largest_gap(stages, list(zip(asked, given, strict=True))) < TIE
    wrong = sum(answer.text != question.answer for (_, question), answer in zip(asked, given, strict=True))
    assert wrong <= len(asked) // 3
