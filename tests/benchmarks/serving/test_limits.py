# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What withdrawal can win at most."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.limits import limits
from benchmarks.serving.models import LLAVA_7B
from vllm_vtw.policy import Policy
from vllm_vtw.search.price import RequestTokens

REQUESTS = st.builds(RequestTokens, st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000))
SHARES = st.floats(0, 1)


def of(request: RequestTokens, layer: int, prefill_share: float = 0.5, short_of_memory: bool = True):
    return limits(request, LLAVA_7B, Policy.withdraw_at(layer, 32), prefill_share, 20, short_of_memory)


def test_as_published():
    # Of LLaVA-1.5's 576 visual and 64 text tokens, with 128 of the answer held.
    assert of(RequestTokens(576, 64, 256), 16).requests == pytest.approx(1.6)
    # "About 0.55" of the work in prompts, less what attention over fewer pairs of tokens saves.
    assert 1 / 0.55 < of(RequestTokens(576, 64, 128), 16).prefill < 1.9


@given(REQUESTS, st.sampled_from((8, 16, 24)), SHARES, st.booleans())
def test_speed_lies_between_those_of_prompts_and_of_decoding(request_, layer, share, short):
    possible = of(request_, layer, share, short)
    assert 1 < possible.requests < 32 / layer
    assert 1 < possible.prefill < 32 / layer
    low, high = sorted((possible.decode, possible.prefill))
    assert low - 1e-9 <= possible.speed <= high + 1e-9


@given(REQUESTS, st.sampled_from((8, 16, 24)))
def test_with_memory_for_all_a_decode_step_still_reads_the_weights(request_, layer):
    assert 1 < of(request_, layer, short_of_memory=False).decode < of(request_, layer).decode


@given(REQUESTS, SHARES, st.booleans())
def test_nothing_is_won_where_nothing_is_withdrawn(request_, share, short):
    possible = of(request_, 32, share, short)
    assert (possible.requests, possible.prefill, possible.speed) == pytest.approx((1, 1, 1))


@given(REQUESTS, SHARES, st.booleans())
def test_a_later_layer_wins_less(request_, share, short):
    speeds = [of(request_, layer, share, short).speed for layer in (8, 16, 24, 32)]
    assert speeds == sorted(speeds, reverse=True)
