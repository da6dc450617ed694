# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The rankings by image alone and by the norm of keys, against plain computations."""

from math import dist, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.image_orders import dithered, diverse, spread
from vllm_vtw.policy import BY_ATTENTION, BY_FEATURES, BY_IMAGE, BY_STATE
from vllm_vtw.rankings import ATTENTION_RANKINGS, FEATURE_RANKINGS, IMAGE_RANKINGS, STATE_RANKINGS, diversity
from vllm_vtw.rankings.diversity import Diversity
from vllm_vtw.rankings.key_norm import KeyNorm
from vllm_vtw.rankings.random import Random
from vllm_vtw.rankings.uniform import Uniform
from vllm_vtw.rankings.variation import Variation


def test_a_policy_names_the_rankings_that_there_are():
    assert tuple(ATTENTION_RANKINGS) == BY_ATTENTION
    assert tuple(STATE_RANKINGS) == BY_STATE
    assert tuple(FEATURE_RANKINGS) == BY_FEATURES
    assert (*IMAGE_RANKINGS, *FEATURE_RANKINGS) == BY_IMAGE


@pytest.mark.parametrize("ranking", IMAGE_RANKINGS.values())
@given(tokens=st.integers(0, 3000), name=st.text())
def test_every_token_of_an_image_has_a_place(ranking, tokens, name):
    order = ranking().order(tokens, name)
    assert sorted(order.tolist()) == list(range(tokens))
    assert (order == ranking().order(tokens, name)).all()


def test_a_quarter_of_a_square_is_every_other_token_of_every_other_row():
    kept = np.zeros((24, 24), dtype=bool)
    kept.flat[Uniform().order(576, "")[:144]] = True
    assert kept[::2, ::2].all()
    kept.flat[Uniform().order(576, "")[144:288]] = True
    rows, columns = np.indices((24, 24))
    assert (kept == ((rows + columns) % 2 == 0)).all(), "a half is a checkerboard"


@given(st.integers(1, 40))
def test_squares_are_dithered(side):
    assert Uniform().order(side * side, "").tolist() == dithered(side)


@given(st.integers(2, 3000), st.data())
def test_gaps_in_a_sequence_are_even(tokens, data):
    if int(sqrt(tokens)) ** 2 == tokens:
        tokens += 1
    kept = data.draw(st.integers(1, tokens))
    positions = np.sort(Uniform().order(tokens, "")[:kept])
    gaps = np.diff(positions, append=tokens)
    assert positions[0] == 0
    assert gaps.max() < 2 * tokens / kept + 1


@given(st.integers(0, 3000))
def test_tokens_are_spread(tokens):
    assert Uniform().order(tokens, "").tolist() == spread(tokens)


def test_lots_are_drawn_for_each_image():
    orders = [Random().order(100, name).tolist() for name in ("one", "another")]
    assert orders[0] != orders[1]
    assert all(order != sorted(order) for order in orders)


@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31))
def test_small_keys_stay(tokens, heads, seed):
    keys = torch.randn(tokens, heads, 4, generator=torch.Generator().manual_seed(seed))
    scores = KeyNorm().score(torch.zeros(heads, 4), keys.bfloat16(), 1.0)
    norms = [sum(sqrt(sum(float(x) ** 2 for x in key)) for key in token) for token in keys.bfloat16().float()]
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([-norm for norm in norms], rel=1e-4)


@given(st.integers(0, 7), st.integers(0, 2**31))
def test_tokens_that_change_stay(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(tokens, 5, generator=generator).bfloat16() for _ in range(2))
    scores = Variation().score(before, after)
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([dist(one, other) for one, other in pairs], rel=1e-4)


@given(st.integers(2, 12), st.data())
def test_tokens_that_differ_stay(tokens, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    features = torch.randn(tokens, 6, generator=generator, dtype=torch.float64).float()
    count = data.draw(st.integers(0, tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "ROWS", data.draw(st.integers(1, 13)))
        order = Diversity().order(features, count)
    assert order.tolist() == diverse(features)[:count]


def test_equal_and_empty_features_have_an_order():
    for features in (torch.ones(5, 3), torch.zeros(5, 3), torch.ones(1, 3)):
        assert sorted(Diversity().order(features, len(features)).tolist()) == list(range(len(features)))
    assert Diversity().order(torch.ones(0, 3), 0).tolist() == []
