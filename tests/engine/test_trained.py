"""Answers that mean something: the shipped model's, in full and withdrawn after half of its layers."""

from itertools import islice

from benchmarks.quality.evaluate import TIE, answers, own_answer
from benchmarks.quality.model import CHECKPOINT, LAYERS
from benchmarks.quality.tasks import TASKS, samples
from tests.engine.engines import running

SAMPLES = 12  # of each task


def test_counting_survives_half_of_the_layers_and_reading_does_not(reference):
    oracle, half = reference(CHECKPOINT), LAYERS // 2
    asked = [sample for task in TASKS for sample in islice(samples("validation", task), SAMPLES)]
    with running(CHECKPOINT, {"layer": half}) as llm:
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
