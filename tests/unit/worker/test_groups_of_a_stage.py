# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Metadata of a stage's groups, which have blocks of their own, with one page or several."""

from typing import Any

import numpy as np
import torch

from tests.unit.worker.builders import (
    BLOCK_SIZE,
    BLOCK_TABLE,
    DECODE,
    DECODE_SLOTS,
    GATED,
    PREFILL,
    PREFILL_SLOTS,
    Leaving,
    begin,
    metadata,
    slots_of,
)
from vllm_vtw.retention import Retention
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.step_plan import Batch, BatchRetentions


def test_groups_of_one_stage_share_what_the_first_has_built(builder, make_builder, step):
    """All but their blocks and slots. The next step builds anew."""
    other = make_builder("layer.5")
    assert not other.supports_update_block_table
    for times in (1, 2):
        begin(step, *PREFILL)
        batch = metadata(*PREFILL)
        first = builder.build(0, batch)
        second = other.build(0, batch.replace(block_table_tensor=BLOCK_TABLE[:2] + 10))
        assert (builder.builds, other.builds) == (times, 0)
    assert second.seq_lens is first.seq_lens
    assert second.query_start_loc is first.query_start_loc
    assert first.block_table.tolist() == BLOCK_TABLE[:2].tolist()
    assert second.block_table.tolist() == (BLOCK_TABLE[:2] + 10).tolist()
    assert first.slot_mapping.tolist() == PREFILL_SLOTS
    assert second.slot_mapping.tolist() == [slot + 10 * BLOCK_SIZE for slot in PREFILL_SLOTS]


def test_stages_share_nothing(make_builder):
    step = CurrentStep(2, torch.device("cpu"))
    rows = BatchRetentions.of([(Retention([(2, 6)]), Retention([(2, 10)])), (Retention(), Retention())])
    builders = [make_builder(f"layer.{stage}", stage, 1, step) for stage in (1, 2)]
    step.begin(Batch(rows, np.array([0, 5]), np.array([0, 14, 15])))
    seen = [one.build(0, metadata(*PREFILL)) for one in builders]
    assert [one.builds for one in builders] == [1, 1]
    assert [one.seq_lens.tolist() for one in seen] == [[10, 6], [6, 6]]


def test_groups_of_one_stage_lie_apart(builder, make_builder, step):
    """A CUDA graph of each group's layers reads what was its own at capture."""
    other = make_builder("layer.5")
    step.begin(None)
    captured = [one.build(0, metadata([0, 0], [1, 1])) for one in (builder, other)]
    begin(step, *DECODE, fixed_shape=True)
    batch = metadata(*DECODE)
    builder.build(0, batch)
    other.build(0, batch.replace(block_table_tensor=BLOCK_TABLE[:2] + 10))
    assert [seen.seq_lens.tolist() for seen in captured] == [[7, 7], [7, 7]]
    apart = [slot + 10 * BLOCK_SIZE for slot in DECODE_SLOTS]
    assert [seen.slot_mapping.tolist() for seen in captured] == [DECODE_SLOTS, apart]


def test_kernels_see_pages_as_blocks(make_builder, step):
    builder = make_builder("layer.4", pages=2)
    begin(step, *PREFILL)
    seen = builder.build(0, metadata(*PREFILL))
    first, second = [7, 107, 8, 108], [3, 103, 5, 105]
    assert seen.block_table.tolist() == [first, second]
    assert seen.slot_mapping.tolist() == slots_of(first, range(6)) + slots_of(second, [5])
    assert seen.seq_lens.tolist() == [6, 6]


def test_a_page_table_lies_where_the_one_before_lay(builder, make_builder, step):
    """Also in a group whose metadata another group has built, with other pages."""
    builders = [builder, make_builder("layer.5", pages=2), make_builder("layer.6", pages=3)]
    step.begin(None)
    captured = [one.build(0, metadata([0, 0], [1, 1])) for one in builders]
    assert [seen.slot_mapping.tolist() for seen in captured] == [[-1, -1]] * 3
    begin(step, *DECODE, fixed_shape=True)
    batch = metadata(*DECODE)
    seen = [one.build(0, batch) for one in builders]
    assert [one.builds for one in builders] == [2, 0, 0]
    two = [[7, 107, 8, 108], [3, 103, 5, 105]]
    three = [[7, 107, 207], [3, 103, 203]]
    for pages, at_capture, now in zip((two, three), captured[1:], seen[1:], strict=True):
        assert at_capture.block_table.tolist() == now.block_table.tolist()
        assert [row[: len(pages[0])] for row in at_capture.block_table.tolist()] == pages
        assert at_capture.block_table.data_ptr() == now.block_table.data_ptr()
        assert at_capture.slot_mapping.tolist() == [slots_of(row, [6])[0] for row in pages]
        assert at_capture.slot_mapping.data_ptr() == now.slot_mapping.data_ptr()
        assert at_capture.seq_lens.tolist() == [7, 7]


def test_stage_0_with_pages_holds_all_tokens(make_builder, step):
    builder = make_builder("layer.0", stage=0, pages=2)
    deeper = make_builder("layer.4")
    begin(step, *PREFILL)
    batch = metadata(*PREFILL)
    seen = builder.build(0, batch)
    first, second = [7, 107, 8, 108], [3, 103, 5, 105]
    assert seen.block_table.tolist() == [first, second]
    assert seen.slot_mapping.tolist() == slots_of(first, range(14)) + slots_of(second, [5])
    assert seen.seq_lens.tolist() == [14, 6]
    assert seen.query_start_loc.tolist() == [0, 14, 15]
    assert deeper.build(0, batch).seq_lens.tolist() == [6, 6]


def test_decodes_of_stage_0_with_pages(make_builder, step):
    """The second step has the plan of the first, but other tokens."""
    builder = make_builder("layer.0", stage=0, pages=2)
    step.begin(None)
    captured = builder.build(0, metadata([0, 0, 0], [1, 1, 1]))
    assert captured.slot_mapping.tolist() == [-1, -1, -1]
    rows = [[7, 107, 8, 108], [3, 103, 5, 105]]
    for more in (0, 1):
        computed = [14 + more, 6 + more]
        begin(step, computed, [1, 1], fixed_shape=True)
        builder.build(0, metadata(computed, [1, 1], padded_rows=1))
        slots = [slots_of(row, [position])[0] for row, position in zip(rows, computed, strict=True)]
        assert captured.slot_mapping.tolist() == [*slots, -1]
        assert captured.seq_lens.tolist() == [15 + more, 7 + more, 0]


def test_stage_0_with_one_page_is_left_to_vllm(builder, step):
    begin(step, *PREFILL)
    builder.build(0, metadata(*PREFILL))
    assert step.of_stage(0) is None
    assert step.seq_lens.keys() == {1}


def test_groups_share_again_after_gates_have_decided(make_builder):
    """Gates before stage 2 leave stage 1 as it is. Groups have pages or not."""
    step = CurrentStep(2, torch.device("cpu"))
    rows = BatchRetentions.of([(Retention((), one_step.start, one_step),) * 2 for one_step in GATED])
    leaving: Any = Leaving()
    step.gates, step.record_exits = leaving, lambda exits: None
    builders = {
        name: make_builder(name, stage, pages, step)
        for name, stage, pages in (("layer.0", 0, 2), ("layer.4", 1, 1), ("layer.5", 1, 2), ("layer.8", 2, 1))
    }
    step.begin(Batch(rows, np.array([0, 0]), np.array([0, 14, 19])))
    batch = metadata([0, 0], [14, 5])
    before = {name: builder.build(0, batch) for name, builder in builders.items()}
    assert [before[name].seq_lens.tolist() for name in before] == [[14, 5]] * 4
    numbers = torch.arange(19.0)[:, None]
    changed = step.ask_gates(1, numbers, torch.zeros_like(numbers))
    assert changed.keys() == {"layer.4", "layer.5", "layer.8"}
    assert [builder.builds for builder in builders.values()] == [1, 2, 0, 2]
    assert before["layer.0"].seq_lens.tolist() == [14, 5]
    for found in changed.values():
        assert found.seq_lens.tolist() == [6, 5]
        assert found.query_start_loc.tolist() == [0, 6, 11]
    assert changed["layer.5"].query_start_loc is changed["layer.4"].query_start_loc
    assert changed["layer.4"].block_table.tolist() == BLOCK_TABLE[:2].tolist()
    assert changed["layer.4"].slot_mapping.tolist() == slots_of([7, 8], range(6)) + slots_of([3, 5], range(5))
    assert changed["layer.5"].block_table.tolist() == [[7, 107, 8, 108], [3, 103, 5, 105]]
    slots = slots_of([7, 107], range(6)) + slots_of([3, 103], range(5))
    assert changed["layer.5"].slot_mapping.tolist() == slots
    numbers = torch.arange(11.0)[:, None]
    changed = step.ask_gates(2, numbers, torch.zeros_like(numbers))
    assert changed.keys() == {"layer.8"}
    assert changed["layer.8"].seq_lens.tolist() == [6, 3]
    assert [builder.builds for builder in builders.values()] == [1, 2, 0, 3]
