# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Blocks for prompts that another engine has computed."""

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kv.managers import BLOCK_SIZE, LAYOUTS, SPECS, Ask, asks, manager
from vllm_vtw.kv.stage_block_manager import StageManager


@LAYOUTS
@given(ask=asks(), align_to=st.sampled_from([1, BLOCK_SIZE]), data=st.data())
def test_every_row_gets_blocks_for_what_its_stage_retains(layout: str, ask: Ask, align_to: int, data):
    vtw = manager(True, SPECS[layout], 4000)
    request = ask.request("first", (ask.prompt.retention(align_to),) * 2)
    again = ask.request("second", request.block_hashes.retentions)
    for stage in vtw.stage_managers:
        stage.retentions = dict.fromkeys(("first", "second"), request.block_hashes.retentions)
        stage.shares_parts = False
    free = [stage.block_pool.get_num_free_blocks() for stage in vtw.stage_managers]
    num_computed = data.draw(st.integers(0, request.num_tokens // BLOCK_SIZE)) * BLOCK_SIZE
    if num_computed:
        vtw.allocate_slots(request, num_computed)
        vtw.free(request)
    blocks, local, _ = vtw.get_computed_blocks(again)
    external = again.num_tokens - local
    assert vtw.allocate_slots(
        again, 0, local, blocks, num_external_computed_tokens=external, delay_cache_blocks=True
    )
    for group in vtw.coordinator.single_type_managers:
        tokens = again.num_tokens
        if isinstance(group, StageManager) and group.stage > 0:
            tokens -= ask.prompt.retention(align_to).num_withdrawn
        row = group.req_to_blocks["second"]
        assert len(row) == -(-tokens // group.block_size)
        # What is shared is whole blocks, and the others are the request's own.
        shared = sum(block.block_hash is not None for block in row)
        assert all(block.block_hash is None and block.ref_cnt == 1 for block in row[shared:])
    vtw.free(again)
    assert [stage.block_pool.get_num_free_blocks() for stage in vtw.stage_managers] == free
