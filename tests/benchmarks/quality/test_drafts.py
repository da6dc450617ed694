# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The committed shares of accepted draft tokens, and the head that is trained for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from benchmarks.quality.drafts import COUNTED, DRAFTS, Head, final_states, loss, table
from benchmarks.quality.model import CHECKPOINT, LAYERS
from benchmarks.quality.packing import IGNORE, Batch, Packer
from benchmarks.quality.tasks import TASKS
from tests.engine.drafters import Eagle
from tests.engine.reference import Reference

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/drafts.json").read_text())
ROWS = {row["name"]: row for row in RESULT["rows"]}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture
def head(model) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = Head(model)
        for weight in head.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
    return head


def test_the_table_says_what_was_measured():
    assert (ROOT / "benchmarks/results/drafts.md").read_text() == table(RESULT["rows"]) + "\n"
    assert table(RESULT["rows"]) in (ROOT / "docs/benchmarks.md").read_text()
    for row in RESULT["rows"]:
        counts, sums = row["counts"], row["counts"]["all"]
        assert [*counts] == [*row["accepted_share"]] == [*row["accepted_per_draft"]] == [*TASKS, "all"]
        assert sums == {name: sum(counts[task][name] for task in TASKS) for name in COUNTED}
        for of, count in counts.items():
            assert count["draft_tokens"] <= DRAFTS * count["drafts"]
            assert row["accepted_share"][of] == count["accepted_tokens"] / count["draft_tokens"]
            assert row["accepted_per_draft"][of] == count["accepted_tokens"] / count["drafts"]


def test_drafts_change_no_answer():
    for row in RESULT["rows"]:
        assert row["equal_answers"] == row["answers"] == len(TASKS) * RESULT["samples_per_task"]


def test_at_all_layers_drafts_are_those_of_stock_vllm():
    assert ROWS["K = 12"]["counts"] == ROWS["stock"]["counts"]
    assert ROWS["stock"]["accepted_share"]["caption"] > 0.8
    assert len(ROWS) > 2


def test_training_states_and_head_are_those_of_the_tests(model, head, tmp_path):
    """With random weights, on a row with two questions. Drafts but the first need the head's own states."""
    reference = Reference(CHECKPOINT)
    row = next(Packer("validation", reference.processor.tokenizer).batches(1))
    states = final_states(model, row)
    head.save(tmp_path)
    eagle = Eagle(str(tmp_path), reference)
    picture = Image.fromarray(row.pixels[0].numpy())
    for question in (1, 2):
        mine = ((row.group == 0) | (row.group == question))[0]
        ids = row.ids[0, mine]
        known = reference.states(ids.tolist(), [reference.embeds(picture)], LAYERS, [False] * len(ids))[-1]
        normed = reference.model.model.language_model.norm(known)
        assert states[0, mine].allclose(normed, atol=1e-3)
        for length in range(len(ids) - 10, len(ids) + 1):
            seen, tokens = normed[: length - 1], ids[:length].tolist()
            drafts: list[int] = []
            for _ in range(DRAFTS):
                out = of_request(head, [*tokens, *drafts], seen)
                drafts.append(int(model.lm_head(out[-1]).argmax()))
                seen = torch.cat([seen, out[-1:]])
            assert drafts == eagle.drafts(tokens, known[: length - 1])


def of_request(head: Head, tokens: list[int], states: torch.Tensor) -> torch.Tensor:
    """The head's states for one request."""
    ids, nothing = torch.tensor([tokens]), torch.empty(0)
    positions, group = torch.arange(len(tokens))[None], torch.zeros_like(ids)
    batch = Batch(nothing, ids, nothing, nothing, positions, group, [[]])
    with torch.no_grad():
        return head(batch, states[None])[0]


def test_the_loss_is_least_at_the_models_states_and_counts_only_drafted_tokens(model):
    """The model itself says the first token of an answer."""
    row = next(Packer("validation", AutoTokenizer.from_pretrained(CHECKPOINT)).batches(1))
    states = final_states(model, row)
    in_answer = [False, *(row.targets[0] != IGNORE).tolist()]

    def off(wrong: int | None) -> float:
        """The loss of a head whose state of one token is wrong."""
        out = states[:, 1:].clone()
        if wrong is not None:
            out[0, wrong - 1] = -out[0, wrong - 1]
        head: Any = lambda batch, seen: out  # noqa: E731
        with torch.no_grad():
            return loss(head, model.lm_head, row, states).item()

    counted = [token for token in range(1, 200) if off(token) > off(None) + 1e-3]
    assert counted == [token for token in range(1, 200) if in_answer[token] and in_answer[token + 1]]
    assert len(counted) > 10
    assert all(off(token) == off(None) for token in {*range(1, 200)} - {*counted})
