# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What the scheduler counts, with made-up numbers of blocks that are held."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.retention import Retention


def statistics(layers: list[int], width: int, held: dict[int, int], pages_of_stage_0: int) -> Statistics:
    """Of blocks with memory for `width` layers, of which each stage holds so many."""
    manager: Any = SimpleNamespace(
        held_blocks=lambda: Counter(held), pages_in_stock=lambda running: pages_of_stage_0
    )
    groups: Any = SimpleNamespace(num_layers=layers[-1], width=width)
    return Statistics(layers, groups, manager)


def test_requests_by_the_layer_that_first_withdraws():
    counting = statistics([4, 6, 8], 4, {0: 0, 1: 0}, 0)
    keeps, leaves = Retention(), Retention([(2, 12)])
    for retentions in ([keeps, keeps], [keeps, leaves], [leaves, leaves], [leaves, leaves]):
        counting.count_request(retentions)
    counting.count_request([leaves, leaves], "on/off")
    counts = counting.take()
    assert {key: counts[key] for key in counts if key.startswith("requests")} == {
        "requests/4/": 2,
        "requests/4/on/off": 1,
        "requests/6/": 1,
        "requests/8/": 1,
    }
    assert (counts["withdrawn_tokens/1"], counts["withdrawn_tokens/2"]) == (30, 40)
    assert "requests/4/" not in counting.take()


def test_differences_that_are_no_numbers_are_left_out_and_infinite_ones_cut_off():
    counting = statistics([4, 8], 4, {0: 0, 1: 0}, 0)
    differences = np.array([0.0, 0.25, 0.3, np.nan, np.inf, 3.0], dtype=np.float32)
    counting.count_reading(4, "on/off", 6, 5, 2, differences)
    counts = {key: count for key, count in counting.take().items() if key.startswith("guard_")}
    assert counts.pop("guard_difference_sum/3/4/on/off") == pytest.approx(0.55e9, rel=1e-6)
    assert counts == {
        "guard_requests/4/on/off": 1,
        "guard_tokens/4/on/off": 6,
        "guard_greedy_tokens/4/on/off": 5,
        "guard_changed_tokens/4/on/off": 2,
        "guard_difference/0/4/on/off": 1,
        "guard_difference_sum/0/4/on/off": 0,
        "guard_difference/3/4/on/off": 2,
        "guard_difference/6/4/on/off": 1,
        "guard_difference_sum/6/4/on/off": 3 * 10**9,
        "guard_difference/7/4/on/off": 1,
        "guard_difference_sum/7/4/on/off": 1000 * 10**9,
    }


@pytest.mark.parametrize(
    ("width", "held", "pages_of_stage_0", "saved"),
    [
        # Stock's 9 blocks of 8 layers have the memory of 18 blocks of 4 layers, and 13 are held.
        (4, {0: 9, 1: 4}, 9, 5),
        # In blocks of 5 layers: 9 * 8 / 5, cut off.
        (5, {0: 9, 1: 4}, 9, 1),
        # Stage 0 has two groups of 2 layers, so every page takes it two blocks.
        (2, {0: 12, 1: 2}, 6, 6 * 4 - 14),
        # Stage 0 has 2 layers with 3 pages in a block: 3 blocks hold 8 pages, the last of them not full.
        (6, {0: 3, 1: 1}, 8, 8 * 8 // 6 - 4),
        # Nothing is withdrawn of a text, and blocks are not full.
        (4, {0: 1, 1: 2}, 1, -1),
    ],
)
def test_blocks(width: int, held: dict[int, int], pages_of_stage_0: int, saved: int):
    assert statistics([4, 8], width, held, pages_of_stage_0).take() == {
        "kv_blocks/0": held[0],
        "kv_blocks/1": held[1],
        "saved/": saved,
    }
