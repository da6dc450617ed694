"""What withdrawal can win at most."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.limits import limits
from benchmarks.serving.models import LLAVA_7B
from vllm_vtw.search.price import Request

REQUESTS = st.builds(Request, st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000))
SHARES = st.floats(0, 1)


def of(request: Request, layer: int, prefill_share: float = 0.5, layer_parameters: int = 0):
    return limits(
        request,
        layer=layer,
        num_layers=32,
        hidden_size=4096,
        layer_parameters=layer_parameters or LLAVA_7B.layer_parameters,
        prefill_share=prefill_share,
    )


def test_as_published():
    # The limits of LLaVA-1.5 with 576 visual, 64 text and 128 held output tokens, and of its prompts.
    assert of(Request(576, 64, 256), 16).requests == pytest.approx(1.6)
    # With nothing but weights, as in "about 0.55"; attention over fewer pairs of tokens adds a little.
    assert of(Request(576, 64, 128), 16, layer_parameters=10**15).prefill == pytest.approx(1 / 0.55)
    assert 1 / 0.55 < of(Request(576, 64, 128), 16).prefill < 1.9


@given(REQUESTS, st.integers(1, 31), SHARES)
def test_speed_lies_between_those_of_prompts_and_of_decoding(request_, layer, share):
    possible = of(request_, layer, share)
    assert 1 < possible.requests < 32 / layer
    assert 1 < possible.prefill < 32 / layer
    low, high = sorted((possible.requests, possible.prefill))
    assert low - 1e-9 <= possible.speed <= high + 1e-9


@given(REQUESTS, SHARES)
def test_nothing_is_won_where_nothing_is_withdrawn(request_, share):
    possible = of(request_, 32, share)
    assert (possible.requests, possible.prefill, possible.speed) == pytest.approx((1, 1, 1))


@given(REQUESTS, st.integers(1, 30), SHARES)
def test_a_later_layer_wins_less(request_, layer, share):
    assert of(request_, layer + 1, share).speed < of(request_, layer, share).speed
