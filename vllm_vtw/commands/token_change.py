# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Whether the share of tokens that withdrawal changes is within a budget, judged from some of the tokens.

Tokens are taken as independent of each other. Those of one answer are not quite, so intervals of few and long
answers are narrower than they should be.
"""

from math import floor, sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
"""A normal distribution has 95% of its mass within this many standard deviations of the mean."""
TOO_SHALLOW, FINE, UNCLEAR, NO_GREEDY_ANSWERS = "too shallow", "fine", "unclear", "no greedy answers"


def wilson_interval(changed: float, tokens: float) -> tuple[float, float]:
    """The 95% Wilson interval of the share of tokens that change.

    Args:
        changed: The number of tokens that changed.
        tokens: The number of tokens that were looked at, at least 1.
    """
    center = (changed + Z**2 / 2) / (tokens + Z**2)
    half = Z / (tokens + Z**2) * sqrt(changed * (tokens - changed) / tokens + Z**2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


def verdict(changed: float, tokens: float, budget: float) -> str:
    """Whether the interval of the share lies above a budget, below it, or neither, or there are no tokens."""
    if not tokens:
        return NO_GREEDY_ANSWERS
    least, most = wilson_interval(changed, tokens)
    if least > budget:
        return TOO_SHALLOW
    return FINE if most < budget else UNCLEAR


def more_tokens(changed: float, tokens: float, budget: float) -> int:
    """About how many more tokens have to be looked at until the verdict is no longer `UNCLEAR`.

    The share is expected to stay as it is. If it is less than a standard error away from the budget, it is
    taken to be one standard error away. The answer brings the number of tokens at least to the one that shows
    that a share is within the budget if no token changes.

    Args:
        changed: The number of tokens that changed.
        tokens: The number of tokens that were looked at, at least 1.
        budget: The largest share that is allowed, more than 0 and less than 1.
    """
    variance = budget * (1 - budget)
    # The interval of n tokens leaves out the budget if it is more than Z * sqrt(variance / n) from the share.
    squared_distance = max((changed / tokens - budget) ** 2, variance / tokens)
    needed = Z**2 * max(variance / squared_distance, (1 - budget) / budget)
    return max(1, floor(needed) + 1 - int(tokens))
