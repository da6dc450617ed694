"""Answers that mean something: the shipped model's, in full and withdrawn after half of its layers."""

import sys
from itertools import islice
from unittest.mock import patch

from benchmarks.quality.calibration import write_data
from benchmarks.quality.evaluate import TIE, answers, own_answer
from benchmarks.quality.model import CHECKPOINT, LAYERS
from benchmarks.quality.tasks import TASKS, samples
from tests.engine.engines import running
from vllm_vtw.cli import main

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
