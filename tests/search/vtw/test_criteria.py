# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The criteria's arithmetic against its definitions, and what a K costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtw.config import ModelShape
from vllm_vtw.policy import Policy
from vllm_vtw.search.divergence import AnswerDivergence, TaskDivergence
from vllm_vtw.search.price import Price, RequestTokens
from vllm_vtw.search.reports.calibration_notes import notes
from vllm_vtw.search.vtw.criteria import answer_layers, default_eta, first_token_layers

LOGITS = st.floats(-8, 8, width=32)
KLS = st.floats(0, 5)


@st.composite
def two_logits(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    size = tokens * vocabulary
    both = [draw(st.lists(LOGITS, min_size=size, max_size=size)) for _ in range(2)]
    full, withdrawn = (torch.tensor(values).view(tokens, vocabulary) for values in both)
    return full, withdrawn


def softmax(row: torch.Tensor) -> list[float]:
    weights = [math.exp(value) for value in row.tolist()]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(two_logits())
def test_differences_are_those_of_the_definitions(logits):
    full, withdrawn = logits
    found = AnswerDivergence.between(full, withdrawn)
    assert found.first_token_kl == pytest.approx(kl(softmax(withdrawn[0]), softmax(full[0])), abs=1e-5)
    wanted = [kl(softmax(p), softmax(q)) for p, q in zip(full, withdrawn, strict=True)]
    assert found.answer_kl == pytest.approx(wanted, abs=1e-5)
    likeliest = [[row.index(max(row)) for row in rows.tolist()] for rows in (full, withdrawn)]
    assert found.changed == [a != b for a, b in zip(*likeliest, strict=True)]


@given(st.lists(st.lists(st.tuples(KLS, st.booleans()), min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_curve_pools_tokens(answers):
    curve = TaskDivergence.of([AnswerDivergence(0.0, [k for k, _ in a], [c for _, c in a]) for a in answers])
    tokens = [token for answer in answers for token in answer]
    assert curve.mean_kl == pytest.approx(sum(k for k, _ in tokens) / len(tokens))
    assert curve.token_change == pytest.approx(sum(c for _, c in tokens) / len(tokens))
    assert curve.answer_change == sum(any(c for _, c in answer) for answer in answers) / len(answers)
    ranked = sorted(k for k, _ in tokens)
    rank = 0.95 * (len(ranked) - 1)
    low, high = ranked[math.floor(rank)], ranked[math.ceil(rank)]
    assert curve.p95_kl == pytest.approx(low + (rank % 1) * (high - low), abs=1e-9)


def test_the_published_choice_is_the_first_from_five_on():
    assert first_token_layers({4: 0.0, 5: 0.02, 6: 0.01, 7: 0.5, 8: 0.0}, eta=0.01) == [6, 8]
    assert first_token_layers({1: 0.0, 5: 0.02}, eta=0.01) == []


def test_the_worst_task_decides():
    def curves(*points):
        return {layer: TaskDivergence(k, k, change, change) for layer, k, change in points}

    good = curves((1, 0.5, 0.0), (2, 0.01, 0.0), (3, 0.0, 0.0), (4, 0.0, 0.0))
    more_tokens = curves((1, 0.0, 0.0), (2, 0.0, 0.3), (3, 0.0, 0.0), (4, 0.0, 0.0))
    more_kl = curves((1, 0.0, 0.0), (2, 0.0, 0.0), (3, 0.3, 0.0), (4, 0.0, 0.0))
    assert answer_layers({"a": good}, 0.02, 0.01) == [2, 3, 4]
    assert answer_layers({"a": good, "b": more_tokens}, 0.02, 0.01) == [3, 4]
    assert answer_layers({"a": good, "b": more_kl}, 0.02, 0.01) == [2, 4]
    assert answer_layers({"a": good, "b": more_tokens, "c": more_kl}, 0.02, 0.01) == [4]
    assert answer_layers({"a": good, "b": more_tokens}, 0.02, 0.3) == [2, 3, 4]
    assert answer_layers({"a": curves((1, 0.5, 0.0))}, 0.02, 0.01) == []


@pytest.mark.parametrize(
    ("model", "vocabulary", "eta"),
    [
        (ModelShape("llava", "llama", 32, 4096), 32064, 0.003),
        (ModelShape("llava", "llama", 40, 5120), 32064, 0.0005),
        (ModelShape("llava_next", "llama", 32, 4096), 32064, 0.0001),
        (ModelShape("llava_next", "llama", 32, 4096), 128320, 0.003),  # over Llama 3
        (ModelShape("llava_next", "mistral", 32, 4096), 32064, 0.003),
    ],
)
def test_eta_is_the_published_one_by_model(model, vocabulary, eta):
    assert default_eta(model, vocabulary) == eta


def test_flops_are_the_published_ones():
    """VTW's paper: LLaVA-1.5-7B at K = 16, 8.48 to 4.68 TFLOPs."""
    hidden, inner = 4096, 11008
    layer = 4 * hidden**2 + 3 * hidden * inner
    price = Price(32, layer, hidden, RequestTokens(visual=576, text=64, output=0))
    assert price.prefill_flops(Policy(())) == pytest.approx(8.48e12, rel=0.02)
    assert price.prefill_flops(Policy.withdraw_at(16, 32)) == pytest.approx(4.68e12, rel=0.02)


@given(
    st.integers(1, 32),
    st.integers(1, 2000),
    st.integers(1, 500),
    st.integers(0, 500),
    st.sampled_from([16, 32]),
)
def test_kv_memory_is_the_limit_and_what_groups_waste(layer, visual, text, output, num_layers):
    layer = min(layer, num_layers)
    price = Price(num_layers, 1, 1, RequestTokens(visual, text, output))
    found = price.kv_share(Policy.withdraw_at(layer, num_layers))
    rest = text + output
    limit = (layer * (visual + rest) + (num_layers - layer) * rest) / (num_layers * (visual + rest))
    assert found >= limit - 1e-9
    if layer * 2 == num_layers:
        assert found == pytest.approx(limit)
    if layer == num_layers:
        assert found == pytest.approx(1)


@pytest.mark.parametrize(
    ("layer", "tokens"),
    [
        # Groups of 10, 10, 10 and 2 layers. A block holds five pages of the last one, so nothing is wasted.
        (20, 20 * 1000 + 12 * 900),
        # Groups of 25 and 7 layers. A block holds three pages of the latter: it has memory for 21 layers.
        (25, 25 * (1000 + 900 / 3)),
    ],
)
def test_what_groups_waste_is_paid(layer, tokens):
    price = Price(32, 1, 1, RequestTokens(visual=100, text=800, output=100))
    assert price.kv_share(Policy.withdraw_at(layer, 32)) == pytest.approx(tokens / 32000)


def test_a_k_with_which_groups_waste_what_is_saved_is_told():
    price = Price(32, 1, 1, RequestTokens(visual=100, text=800, output=100))
    result = {
        "criterion": "answer",
        "layers": [24, 25],
        "kv_share": [price.kv_share(Policy.withdraw_at(layer, 32)) for layer in (24, 25)],
        "budget": {"max_token_change": 0.01},
        "model": {"model_type": "llava", "num_hidden_layers": 32},
        "tasks": {},
    }
    saves, wastes = (notes(result | {"layer": {"answer": layer}}, ()) for layer in (24, 25))
    assert wastes[1:] == saves
    assert wastes[0].startswith("At K = 25 KV-cache groups waste at least as much memory as withdrawal saves")
