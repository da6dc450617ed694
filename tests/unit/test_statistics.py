"""What the scheduler counts, on managers that hold made-up rows."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.retention import Retention

ALL = FullAttentionSpec(block_size=8, num_kv_heads=1, head_size=32, dtype=torch.float32)


@dataclass
class Block:
    block_id: int


def manager(spec, **blocks: int) -> SimpleNamespace:
    """Of a group that holds so many blocks of each request."""
    ids = iter(range(100))
    rows = {request: [Block(next(ids)) for _ in range(count)] for request, count in blocks.items()}
    return SimpleNamespace(kv_cache_spec=spec, req_to_blocks=rows)


def test_a_shared_block_is_held_once():
    both = manager(ALL, a=3, b=2)
    both.req_to_blocks["b"][:1] = both.req_to_blocks["a"][:1]
    deep = manager(StageSpec.like(ALL, 1), a=2, b=1)
    deep.req_to_blocks["b"] = deep.req_to_blocks["a"][:1]
    assert Statistics([4, 8], config(4, 4), [both, deep]).take() == {
        "kv_blocks/0": 4,
        "kv_blocks/1": 2,
        "saved/": 2,
    }


def config(*layers: int) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=range(count)) for count in layers])


def test_requests_by_the_layer_that_first_withdraws():
    stage = StageSpec.like(ALL, 1)
    statistics = Statistics([4, 6, 8], config(4, 4), [manager(ALL), manager(stage)])
    keeps, leaves = Retention(), Retention([(2, 12)])
    for retentions in ([keeps, keeps], [keeps, leaves], [leaves, leaves], [leaves, leaves]):
        statistics.count_request(retentions)
    counts = statistics.take()
    assert {key: counts[key] for key in counts if key.startswith("requests")} == {
        "requests/4": 2,
        "requests/6": 1,
        "requests/8": 1,
    }
    assert (counts["withdrawn_tokens/1"], counts["withdrawn_tokens/2"]) == (20, 30)
    assert "requests/4" not in statistics.take()


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
    managers = [manager(ALL, a=7, b=2), manager(StageSpec.like(ALL, 1), a=2, b=2)]
    assert Statistics([4, 8], config(*layers), managers).take() == {
        "kv_blocks/0": 9,
        "kv_blocks/1": 4,
        "saved/": saved,
    }


def test_a_stage_of_several_groups():
    stage = StageSpec.like(ALL, 1)
    managers = [manager(ALL, a=6), manager(ALL, a=6), manager(stage, a=2)]
    assert Statistics([4, 6], config(2, 2, 2), managers).take() == {
        "kv_blocks/0": 12,
        "kv_blocks/1": 2,
        "saved/": 6 * 3 - 14,
    }
