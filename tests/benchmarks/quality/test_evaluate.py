# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Scores, the reference's own answers, and what the pages say of the shipped model."""

import hashlib
import json
import re
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.quality.evaluate import TIE, Answer, own_answer, score
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS, samples

RESULTS = CHECKPOINT.parents[1] / "results" / "quality"


class FakeOracle:
    """Always says `answer`, whatever it is asked; `gap` is by how much it prefers that."""

    def __init__(self, answer: list[int], prompt: int, gap: float) -> None:
        self.answer, self.prompt, self.gap = answer, prompt, gap
        self.processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0))

    def embeds(self, picture):
        return torch.zeros(1, 1)

    def dropped(self, ids, num_prompt_tokens, block_size):
        assert (num_prompt_tokens, block_size) == (self.prompt, 1)
        return [False] * len(ids)

    def logits(self, ids, embeds, layer, dropped):
        logits = torch.zeros(len(ids), 10)
        for at in range(len(ids)):
            said = at + 1 - self.prompt
            logits[at, self.answer[said] if 0 <= said < len(self.answer) else 9] = self.gap
        return logits


@pytest.mark.parametrize(
    ("given_tokens", "gap"),
    [([5, 6, 7, 0], 0.0), ([5, 2, 2, 0], 0.25), ([5, 0], 0.25), ([4], 0.25), ([5, 6, 7, 3, 3], 0.25)],
    ids=["same", "other words", "ends early", "one token", "goes on"],
)
def test_the_reference_gives_its_own_answer(given_tokens, gap):
    oracle: Any = FakeOracle([5, 6, 7, 0], prompt=3, gap=0.25)
    answer = Answer("", [1, 1, 1], given_tokens)
    assert own_answer(oracle, 1, Image.new("RGB", (1, 1)), answer) == ([5, 6, 7, 0], gap)


def test_the_reference_stops_at_the_longest_answer():
    oracle: Any = FakeOracle([5], prompt=3, gap=1.0)
    said, _ = own_answer(oracle, 1, Image.new("RGB", (1, 1)), Answer("", [1, 1, 1], [4]))
    assert said == [5] + [9] * (MAX_ANSWER_TOKENS - 1)


def test_a_wrong_answer_costs_its_task_alone():
    asked = [sample for task in TASKS for sample in islice(samples("test", task), 4)]
    given = [Answer(question.answer, [], []) for _, question in asked]
    assert set(score(asked, given).right.values()) == {1.0}
    at = next(at for at, (_, question) in enumerate(asked) if question.task == "caption")
    given[at].text = given[at].text.rpartition(", ")[0]
    found = score(asked, given)
    assert found.right.pop("caption") == 0.75
    assert set(found.right.values()) == {1.0}
    names = asked[at][1].answer.count(", ") + 1
    assert found.objects == pytest.approx((3 + (names - 1) / names) / 4)


@pytest.fixture(scope="module")
def report():
    return json.loads(RESULTS.with_suffix(".json").read_text())


def test_the_shipped_model_was_measured_and_is_good_enough(report):
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    assert len(weights) < 25e6
    assert hashlib.sha256(weights).hexdigest() == report["weights"]
    assert report["samples_per_task"] >= 500
    by_layer = {result["layer"]: result for result in report["results"]}
    assert set(by_layer) == set(range(1, LAYERS + 1))
    assert all(result["check"]["largest_gap"] <= TIE for result in by_layer.values())
    stock = by_layer[LAYERS]["engine"]
    assert all(stock["right"][task] >= 0.95 for task in ("presence", "attribute", "relation"))
    assert stock["right"]["counting"] >= 0.9
    assert stock["right"]["ocr"] >= 0.85
    assert stock["objects"] >= 0.85


@pytest.mark.parametrize(
    "page", [CHECKPOINT / "README.md", CHECKPOINT.parents[2] / "docs/choosing-a-layer.md"]
)
def test_pages_say_what_was_measured(page):
    measured = RESULTS.with_suffix(".md").read_text().splitlines()
    said = [line for line in page.read_text().splitlines() if re.match(r"\| (stock|K = \d+) \|", line)]
    assert said
    for other in ("task-layers.md", "drafts.md"):
        measured += RESULTS.with_name(other).read_text().splitlines()
    assert set(said) <= {*measured}
