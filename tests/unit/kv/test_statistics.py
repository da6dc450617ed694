# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What the scheduler counts, with made-up numbers of blocks that are held."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.retention import Retention

ALL = FullAttentionSpec(block_size=8, num_kv_heads=1, head_size=32, dtype=torch.float32)


STAGE = StageSpec.like(ALL, 1)


def statistics(layers: list[int], groups: Sequence[tuple[KVCacheSpec, int]], **held: int) -> Statistics:
    """Of groups with a spec and a number of layers each, and the blocks that are held, by stage."""
    made = [SimpleNamespace(kv_cache_spec=spec, layer_names=range(count)) for spec, count in groups]
    counts = Counter({int(stage.removeprefix("stage")): blocks for stage, blocks in held.items()})
    manager: Any = SimpleNamespace(held_blocks=lambda: counts)
    return Statistics(layers, SimpleNamespace(kv_cache_groups=made), manager)


def test_requests_by_the_layer_that_first_withdraws():
    counting = statistics([4, 6, 8], [(ALL, 4), (STAGE, 4)], stage0=0, stage1=0)
    keeps, leaves = Retention(), Retention([(2, 12)])
    for retentions in ([keeps, keeps], [keeps, leaves], [leaves, leaves], [leaves, leaves]):
        counting.count_request(retentions)
    counts = counting.take()
    assert {key: counts[key] for key in counts if key.startswith("requests")} == {
        "requests/4": 2,
        "requests/6": 1,
        "requests/8": 1,
    }
    assert (counts["withdrawn_tokens/1"], counts["withdrawn_tokens/2"]) == (20, 30)
    assert "requests/4" not in counting.take()


@pytest.mark.parametrize(
    ("layers", "saved"),
    [
        # Groups in the room of 4 layers: stock's 9 blocks of 8 layers are 18 of them, and 13 are held.
        ((4, 4), 5),
        # In the room of 5: 9 x 8 / 5, cut off.
        ((5, 3), 1),
    ],
)
def test_blocks(layers, saved):
    groups = list(zip((ALL, STAGE), layers, strict=True))
    assert statistics([4, 8], groups, stage0=9, stage1=4).take() == {
        "kv_blocks/0": 9,
        "kv_blocks/1": 4,
        "saved/": saved,
    }


def test_a_stage_of_several_groups():
    groups = [(ALL, 2), (ALL, 2), (STAGE, 2)]
    assert statistics([4, 6], groups, stage0=12, stage1=2).take() == {
        "kv_blocks/0": 12,
        "kv_blocks/1": 2,
        "saved/": 6 * 3 - 14,
    }
