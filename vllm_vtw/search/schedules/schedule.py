# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Merges a schedule, the fraction of visual tokens that each layer gets, into a policy of few stages.

Layers are counted from 0, as everywhere in the plugin. The paper (arXiv 2412.00556) counts them from 1.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import numpy as np

from vllm_vtw.capacity import max_groups
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import Price

FIRST_LAYER = 2
"""The first layer that may get fewer visual tokens. Attention in layer 0 says little about which tokens
deeper layers attend to."""
GRID = 64
"""The fractions that are searched are multiples of 1 / `GRID`."""


def merge_stages(keeps: Sequence[float], max_stages: int, price: Price) -> Policy:
    """Returns the cheapest policy of few stages that gives each layer at least the fraction that it needs.

    A stage keeps the fraction that its first layer needs. The cost of a policy includes the padding of
    KV-cache groups, which have the same width (number of layers) in all stages. Therefore the best stages are
    found for each width, and then the cheapest of these policies is taken.

    For example, layers that need the fractions 1, 1, 1, 0.5, 0.5, 0.1 get 1, 1, 1, 0.5, 0.5, 0.5 if the
    stages begin at layers 0 and 3.

    Args:
        keeps: The fraction of visual tokens that each layer needs. The first one is 1, and none is more than
            the one before.
        max_stages: The largest number of stages, stage 0 included.
        price: Computes the cost of policies.
    """
    assert keeps[0] == 1
    assert all(later <= earlier for earlier, later in pairwise(keeps))
    found = {
        policy_at_borders(keeps, borders)
        for width in range(1, len(keeps) + 1)
        for borders in _borders(keeps, max_stages, price, width)
    }
    return min(found, key=price.cost)


def policy_at_borders(keeps: Sequence[float], borders: Collection[int]) -> Policy:
    """Returns the policy of a schedule whose stages begin at given layers.

    For example, the fractions 1, 0.9, 0.5, 0.3, 0.2 and the borders 2 and 4 make the stages 0.5 from layer 2
    on and 0.2 from layer 4 on.

    Args:
        keeps: The fraction of visual tokens for each layer.
        borders: The layers at which stages begin. One whose fraction is not less than that of the stage
            before has no effect.
    """
    before = 1.0
    stages: list[Stage] = []
    for layer, keep in enumerate(keeps):
        if layer in borders and keep < before:
            before = keep
            stages.append(Stage(layer, keep))
    return Policy(tuple(stages))


def keeps_by_layer(policy: Policy, num_layers: int) -> list[float]:
    """The fraction of visual tokens that each layer gets under a policy."""
    return [
        keep for keep, layers in zip(policy.keeps, policy.segments(num_layers), strict=True) for _ in layers
    ]


def _borders(keeps: Sequence[float], max_stages: int, price: Price, width: int) -> Iterator[set[int]]:
    """For each number of stages, finds the cheapest ones under the assumption that all groups have one width.

    This is dynamic programming. Its state is the layer at which the last stage ends and the number of groups
    used so far, of which there may be at most `max_groups`.

    Yields:
        The first layers of the cheapest stages, stage 0 included.
    """
    num_layers = len(keeps)
    layers = np.arange(num_layers + 1)
    # sizes[start, stop] and groups[start, stop]: the layers and KV-cache groups of a stage that begins with
    # layer `start` and ends before layer `stop`.
    sizes = layers - layers[:, None]
    groups = -(-sizes // width)
    # Cost of one layer by the stage's first layer, as a column. The 0 at the end fills the row for
    # `num_layers`, where no stage begins.
    work, held = (
        np.array([*(of_layer(keep) / (num_layers * of_layer(1)) for keep in keeps), 0])[:, None]
        for of_layer in (price.layer_flops, price.layer_held)
    )
    # cost[start, stop]: the cost of the stage. A stage has to end before a layer that needs less than the
    # stage gives. Other stages, and empty ones, are ruled out.
    cost = price.work_weight * sizes * work + groups * width * held
    needed = np.array([*keeps, -1])
    cost[(sizes <= 0) | (needed >= needed[:, None])] = np.inf
    # least[used, stop]: the least cost of the layers before `stop` in the present number of stages, which
    # have `used` groups together.
    used = np.arange(max_groups(max_stages) + 1)
    least = np.where((used[:, None] == 0) & (layers == 0), 0, np.inf)
    used_before = used[:, None, None] - groups
    begins = []
    for num_stages in range(1, max_stages + 1):
        before = least[used_before.clip(0, used[-1]), layers[:, None]]
        in_one_more = np.where(used_before >= 0, before, np.inf) + cost
        begins.append(in_one_more.argmin(1))
        least = in_one_more.min(1)
        whole = least[: max_groups(num_stages) + 1, num_layers]
        if np.isfinite(whole).any():
            yield _trace_back(begins, groups, int(whole.argmin()))


def _trace_back(begins: Sequence[np.ndarray], groups: np.ndarray, used: int) -> set[int]:
    """Follows the choices of `_borders` back from the last layer.

    Args:
        begins: For each number of stages, the first layer of the last stage, by groups used and by `stop`.
        groups: The number of groups of a stage, by its first layer and `stop`.
        used: The number of groups that all stages use together.

    Returns:
        The first layers of the stages.
    """
    stop, borders = len(groups) - 1, set()
    for begin in reversed(begins):
        start = int(begin[used, stop])
        borders.add(start)
        used -= groups[start, stop]
        stop = start
    return borders
