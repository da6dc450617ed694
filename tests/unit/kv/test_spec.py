# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The memory that vLLM reckons with for the KV cache specs of stages."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kv.managers import ALL, BLOCK_SIZE
from vllm_vtw.capacity import LayerGroups
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy


@given(st.integers(2, 32), st.integers(1, 5000), st.data())
def test_memory_of_the_largest_request_is_that_of_the_rank_that_needs_the_most(
    num_layers: int, tokens: int, data: st.DataObject
):
    """vLLM adds up the groups of all ranks. No more than a block a group is counted too much."""
    policy = Policy.withdraw_at(data.draw(st.integers(1, num_layers - 1)), num_layers)
    cut = data.draw(st.integers(1, num_layers - 1))
    groups = LayerGroups.of(policy, num_layers, [range(cut), range(cut, num_layers)])
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=tokens))
    counted = 0
    for group in groups.groups:
        spec = StageSpec.like(ALL, groups, group)
        counted += -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
    needed = groups.blocks([tokens] * groups.num_stages, BLOCK_SIZE)
    assert needed <= counted < needed + groups.most_groups
