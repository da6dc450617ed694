"""Schedules: the fraction of visual tokens that each layer gets, and the few stages made of it.

Layers are counted from 0, as everywhere in the plugin.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import numpy as np

from vllm_vtw.capacity import max_groups
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.price import Price

FIRST_LAYER = 2
"""Layers before it get everything: the first one's attention says little of what later ones look at."""
GRID = 64
"""Fractions that are searched are so many parts of all visual tokens."""


def merged(keeps: Sequence[float], max_stages: int, price: Price) -> Policy:
    """The policy of at most `max_stages` stages that costs least and keeps what each layer needs.

    A stage keeps what its first layer needs. Cost has the padding of KV-cache groups in it, which are of one
    width for all stages: so for every width the best stages are found, and then the best of those.

    Args:
        keeps: For each layer the fraction of visual tokens that it gets: 1 at first, and never rising.
        max_stages: Stage 0, which holds everything, included.
        price: Of policies.
    """
    assert keeps[0] == 1
    assert all(later <= earlier for earlier, later in pairwise(keeps))
    found = {
        at_borders(keeps, borders)
        for width in range(1, len(keeps) + 1)
        for borders in _borders(keeps, max_stages, price, width)
    }
    return min(found, key=price.cost)


def at_borders(keeps: Sequence[float], borders: Collection[int]) -> Policy:
    """The policy by which layers get the fraction of the nearest border at or before them, or everything."""
    given = 1.0
    stages: list[Stage] = []
    for layer, keep in enumerate(keeps):
        if layer in borders and keep < given:
            given = keep
            stages.append(Stage(layer, keep))
    return Policy(tuple(stages))


def of_policy(policy: Policy, num_layers: int) -> list[float]:
    """The fraction that each layer gets."""
    return [
        keep for keep, layers in zip(policy.keeps, policy.segments(num_layers), strict=True) for _ in layers
    ]


def _borders(keeps: Sequence[float], max_stages: int, price: Price, width: int) -> Iterator[set[int]]:
    """For each number of stages, where those begin that cost least if every group has `width` layers."""
    num_layers = len(keeps)
    layers = np.arange(num_layers + 1)
    sizes = layers - layers[:, None]
    groups = -(-sizes // width)
    # By a stage's first layer; at the end there is none.
    work, held = (
        np.array([*(of_layer(keep) / (num_layers * of_layer(1)) for keep in keeps), 0])[:, None]
        for of_layer in (price.layer_flops, price.layer_held)
    )
    # cost[start, stop]: of a stage, which ends where less is needed than it gives.
    cost = price.work_weight * sizes * work + groups * width * held
    needed = np.array([*keeps, -1])
    cost[(sizes <= 0) | (needed >= needed[:, None])] = np.inf
    # least[used, stop]: of the layers before `stop`, in so many stages of so many groups together.
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
            yield _traced(begins, groups, int(whole.argmin()))


def _traced(begins: Sequence[np.ndarray], groups: np.ndarray, used: int) -> set[int]:
    """The borders behind the best way of using so many groups."""
    stop, borders = len(groups) - 1, set()
    for begin in reversed(begins):
        start = int(begin[used, stop])
        borders.add(start)
        used -= groups[start, stop]
        stop = start
    return borders
