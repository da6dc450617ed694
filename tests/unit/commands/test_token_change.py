# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The interval of a share, the verdict, and the estimate of how many tokens would tell."""

from math import sqrt

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_vtw.commands.token_change import (
    FINE,
    NO_GREEDY_ANSWERS,
    TOO_SHALLOW,
    UNCLEAR,
    more_tokens,
    verdict,
    wilson_interval,
)

Z = 1.959963984540054
BUDGETS = st.floats(0.0001, 0.9999)


@st.composite
def samples(draw: st.DrawFn) -> tuple[int, int]:
    """A number of tokens, and how many of them changed, with small shares as often as large ones."""
    tokens = draw(st.integers(1, 1_000_000))
    return draw(st.integers(0, tokens) | st.integers(0, min(tokens, tokens // 50 + 1))), tokens


@given(samples())
def test_the_interval_ends_where_the_score_test_rejects(sample):
    """Wilson's interval has the shares that are at most Z of their own standard errors away."""
    changed, tokens = sample
    share = changed / tokens
    least, most = wilson_interval(changed, tokens)
    assert 0 <= least <= share + 1e-12
    assert share - 1e-12 <= most <= 1
    for end in (least, most):
        variance = end * (1 - end) / tokens
        assert (share - end) ** 2 == pytest.approx(Z**2 * variance, rel=1e-6, abs=1e-12)


@given(samples())
def test_what_did_not_change_has_the_mirrored_interval(sample):
    changed, tokens = sample
    least, most = wilson_interval(changed, tokens)
    assert wilson_interval(tokens - changed, tokens) == pytest.approx((1 - most, 1 - least), abs=1e-12)


def test_published_intervals():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(samples(), BUDGETS)
def test_the_verdict_is_that_of_the_interval(sample, budget):
    changed, tokens = sample
    least, most = wilson_interval(changed, tokens)
    judged = verdict(changed, tokens, budget)
    assert (judged == TOO_SHALLOW) == (least > budget)
    assert (judged == FINE) == (most < budget)
    assert judged in {TOO_SHALLOW, FINE, UNCLEAR}


def test_without_greedy_tokens_there_is_no_verdict():
    assert verdict(0, 0, 0.01) == NO_GREEDY_ANSWERS


@given(st.integers(1, 100_000), BUDGETS)
def test_if_nothing_changes_the_estimate_is_exact(tokens, budget):
    """But where the budget is so large that no tokens are needed, or rounding decides."""
    assume(verdict(0, tokens, budget) == UNCLEAR)
    more = more_tokens(0, tokens, budget)
    assert verdict(0, tokens + more, budget * (1 + 1e-9)) == FINE
    if more > 1:
        assert verdict(0, tokens + more - 1, budget * (1 - 1e-9)) == UNCLEAR


@given(st.integers(1, 1_000_000), BUDGETS, st.floats(1.01, 1.95), st.sampled_from([-1, 1]))
def test_as_many_more_tokens_tell_if_the_share_stays(tokens, budget, errors, sign):
    """A share that is more than a standard error, and less than Z of them, away from the budget."""
    share = budget + sign * errors * sqrt(budget * (1 - budget) / tokens)
    assume(0 <= share <= 1)
    assert verdict(share * tokens, tokens, budget) == UNCLEAR
    total = tokens + more_tokens(share * tokens, tokens, budget)
    least, most = wilson_interval(share * total, total)
    assert least > budget * (1 - 1e-9) or most < budget * (1 + 1e-9)


@st.composite
def unclear(draw: st.DrawFn) -> tuple[int, int, float]:
    """A sample whose interval contains the budget, and the budget."""
    changed, tokens = draw(samples())
    least, most = wilson_interval(changed, tokens)
    budget = least + draw(st.floats(0.001, 0.999)) * (most - least)
    return changed, tokens, min(max(budget, 0.0001), 0.9999)


@given(unclear())
def test_the_estimate_stays_in_proportion(sample):
    """It is at least one token, and at most three times as many as were read, or what a share of 0 needs."""
    changed, tokens, budget = sample
    assume(verdict(changed, tokens, budget) == UNCLEAR)
    most = max(Z**2 * tokens, Z**2 * (1 - budget) / budget) - tokens
    assert 1 <= more_tokens(changed, tokens, budget) <= most + 2


@pytest.mark.parametrize(
    ("changed", "tokens", "more"),
    # 3.8415 * 0.99 / 0.01 = 380.3; 3.8415 * 0.0099 / 0.005^2 = 1521.2; 3.8415 * 1000 = 3841.5.
    [(0, 1, 380), (0, 380, 1), (1, 20, 361), (15, 1000, 522), (10, 1000, 2842)],
)
def test_estimates_at_the_default_budget(changed, tokens, more):
    assert verdict(changed, tokens, 0.01) == UNCLEAR
    assert more_tokens(changed, tokens, 0.01) == more
