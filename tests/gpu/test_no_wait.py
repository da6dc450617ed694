# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A decode step's plan and metadata never make the host wait for the device."""

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_vtw.retention import Retention
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.pages import PageStrides, PageTable
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer
from vllm_vtw.worker.step_plan import Batch, BatchRetentions

ROWS, BLOCKS, BLOCK_SIZE = 256, 8, 16


@pytest.fixture
def waiting_fails():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_decode(waiting_fails):
    device = torch.device("cuda")
    step = CurrentStep(1, device)
    slots, seq_lens = (
        SlotMapping(ROWS, device),
        StepBuffer(torch.zeros(ROWS, dtype=torch.int32, device=device)),
    )
    blocks = torch.zeros(ROWS, BLOCKS, dtype=torch.int32, device=device)
    table = PageTable(blocks, ROWS, PageStrides(block=2, page=1), pages=2)
    starts = np.arange(ROWS + 1)
    first, second = (BatchRetentions.of([(Retention([(2, 2 + length)]),)] * ROWS) for length in (10, 20))
    for rows, position in ((first, 60), (first, 61), (second, 70)):
        step.begin(Batch(rows, np.full(ROWS, position), starts))
        batch = CommonAttentionMetadata(
            query_start_loc=torch.arange(ROWS + 1, dtype=torch.int32, device=device),
            query_start_loc_cpu=torch.arange(ROWS + 1, dtype=torch.int32),
            seq_lens=torch.full((ROWS,), position + 1, dtype=torch.int32, device=device),
            seq_lens_cpu_upper_bound=torch.full((ROWS,), position + 1, dtype=torch.int32),
            num_reqs=ROWS,
            num_actual_tokens=ROWS,
            max_query_len=1,
            max_seq_len=position + 1,
            block_table_tensor=blocks,
            slot_mapping=torch.arange(ROWS, device=device),
            positions=torch.full((ROWS,), position, device=device),
        )
        (stage,) = step.stages
        assert stage is not None
        assert batch.positions is not None
        stage.set_ranks(batch.positions)
        of_pages = table.write(batch.block_table_tensor, -(-batch.max_seq_len // BLOCK_SIZE))
        stage.write_slots(slots, batch, of_pages, BLOCK_SIZE)
        stage.metadata(batch, seq_lens)
    torch.cuda.set_sync_debug_mode("default")
    # Rank 50 is in page 3 of its row: page 1 of block 0, which is in every column.
    assert slots.whole.unique().tolist() == [BLOCK_SIZE + (70 - 20) % BLOCK_SIZE]
    assert seq_lens.whole.unique().tolist() == [71 - 20]
