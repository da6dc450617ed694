# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a stage's metadata builder hands to the builder of the model's own backend."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from tests.unit.worker.builders import (
    BLOCK_SIZE,
    DECODE,
    DECODE_SLOTS,
    GATED,
    MAX_TOKENS,
    PREFILL,
    PREFILL_SLOTS,
    ROWS,
    Builder,
    Leaving,
    begin,
    metadata,
)
from vllm_vtw.retention import Retention
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer
from vllm_vtw.worker.step_plan import Batch, BatchRetentions


def test_the_stage_sees_what_it_retains(builder, step):
    begin(step, *PREFILL)
    seen = builder.build(0, metadata(*PREFILL))
    assert seen.query_start_loc.tolist() == seen.query_start_loc_cpu.tolist() == [0, 6, 7]
    assert seen.seq_lens.tolist() == [6, 6]
    assert (seen.num_actual_tokens, seen.max_query_len) == (7, 6)
    assert seen.slot_mapping.tolist() == PREFILL_SLOTS
    assert step.slots["layer.4"].whole.tolist() == PREFILL_SLOTS + [-1] * (MAX_TOKENS - 7)
    assert step.stages[0].kept.tolist() == step.stages[0].gather.tolist() == [0, 1, 10, 11, 12, 13, 14]


def test_a_padded_decode_lies_where_the_one_before_lay(builder, step):
    """What a CUDA graph of the whole model reads: it was captured in a dummy run."""
    step.begin(None)
    captured = builder.build(0, metadata([0, 0, 0], [1, 1, 1]))
    assert captured.slot_mapping.tolist() == [-1, -1, -1]
    begin(step, *DECODE, fixed_shape=True)
    seen = builder.build(0, metadata(*DECODE, padded_rows=1))
    assert captured.slot_mapping.tolist() == seen.slot_mapping.tolist() == [*DECODE_SLOTS, -1]
    assert captured.seq_lens.tolist() == seen.seq_lens.tolist() == [7, 7, 0]
    assert captured.seq_lens.data_ptr() == seen.seq_lens.data_ptr()
    assert captured.slot_mapping.data_ptr() == seen.slot_mapping.data_ptr()
    assert step.stages[0].kept is None


def test_a_withdrawn_token_in_a_graph_of_the_whole_model_is_not_stored(builder, step):
    """A prefill's chunk of one token runs as a decode."""
    chunk = ([5, 6], [1, 1])
    begin(step, *chunk, fixed_shape=True)
    seen = builder.build(0, metadata(*chunk))
    assert seen.slot_mapping.tolist() == [-1, 22]
    assert seen.seq_lens.tolist() == [2, 7]
    assert seen.query_start_loc.tolist() == [0, 1, 2]
    assert step.stages[0].gather is None


def test_lengths_follow_the_device_where_the_host_only_guesses(builder, step):
    """With asynchronous speculation the host takes every draft for accepted."""
    begin(step, [17, 9], [1, 1])
    seen = builder.build(0, metadata(*DECODE))
    assert seen.seq_lens.tolist() == [7, 7]
    assert seen.slot_mapping.tolist() == DECODE_SLOTS


@pytest.mark.parametrize(("requests", "longest"), [([0, 1], 15), ([0], 7)])
def test_no_row_is_longer_than_the_longest(builder, step, requests, longest):
    """A text may be the longest, whatever the others withdrew."""
    computed, scheduled = ([values[request] for request in requests] for values in DECODE)
    rows = BatchRetentions.of([ROWS.by_row[request] for request in requests])
    step.begin(Batch(rows, np.array(computed), np.cumsum([0, *scheduled])))
    seen = builder.build(0, metadata(computed, scheduled))
    assert seen.max_seq_len == longest
    assert max(seen.seq_lens.tolist()) <= longest


def test_a_dummy_run_stores_nothing(builder, step):
    begin(step, *PREFILL)
    builder.build(0, metadata(*PREFILL))
    step.begin(None)
    seen = builder.build(0, metadata(*PREFILL))
    assert seen.slot_mapping.tolist() == [-1] * 15
    assert set(step.slots["layer.4"].whole.tolist()) == {-1}
    assert seen.seq_lens.tolist() == [14, 6]


@pytest.mark.parametrize(
    ("of_backend", "speculative", "v2", "expected"),
    [
        ("ALWAYS", None, True, "UNIFORM_BATCH"),
        ("ALWAYS", "ngram", True, "UNIFORM_BATCH"),
        ("ALWAYS", None, False, "UNIFORM_BATCH"),
        ("ALWAYS", "ngram", False, "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("NEVER", None, True, "NEVER"),
    ],
)
def test_graphs_of_the_whole_model(builder, monkeypatch, of_backend, speculative, v2, expected):
    monkeypatch.setattr(Builder, "_cudagraph_support", AttentionCGSupport[of_backend])
    config = SimpleNamespace(speculative_config=speculative, use_v2_model_runner=v2)
    assert builder.get_cudagraph_support(config, None) == AttentionCGSupport[expected]


def test_metadata_follow_what_gates_decide(step, make_builder):
    """vLLM makes builders twice where it measures CUDA graphs."""
    rows = BatchRetentions.of([(Retention((), one_step.start, one_step),) for one_step in GATED])
    exits: dict[int, int | None] = {}
    step.gates = Leaving()
    step.record_exits = exits.update
    make_builder("layer.4")
    builder = make_builder("layer.4")
    step.begin(Batch(rows, np.array([0, 0]), np.array([0, 14, 19])))
    given = metadata([0, 0], [14, 5])
    assert builder.build(0, given).seq_lens.tolist() == [14, 5]
    numbers = torch.arange(19.0)[:, None]
    changed = step.ask_gates(1, numbers, torch.zeros_like(numbers))
    assert step.gates.texts == [[[10], [11], [12], [13]], [[17], [18]]]
    assert exits == {0: 1, 1: None}
    assert changed.keys() == {"layer.4"}
    found = changed["layer.4"]
    assert found.seq_lens.tolist() == [6, 5]
    assert found.query_start_loc.tolist() == [0, 6, 11]
    assert found.num_actual_tokens == 11
    slots = [7 * BLOCK_SIZE + at for at in range(4)] + [8 * BLOCK_SIZE, 8 * BLOCK_SIZE + 1]
    slots += [3 * BLOCK_SIZE + at for at in range(4)] + [5 * BLOCK_SIZE]
    assert found.slot_mapping.tolist() == slots
    assert step.stages[0].kept.tolist() == [0, 1, *range(10, 19)]
    assert not step.gated_prompts


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 12)),
        min_size=1,
        max_size=6,
    )
)
def test_metadata_are_what_kernels_rely_on(requests):
    """Of requests with so many tokens computed, so many more in this step, and a picture at such a place.

    Kernels index by `query_start_loc`, take `max_query_len == 1` for a token in every row, and take lengths
    for what they may read.
    """
    stages = [
        (Retention([(start, start + size)]) if size else Retention(),) for _, _, start, size in requests
    ]
    computed, scheduled = ([one[at] for one in requests] for at in (0, 1))
    step = CurrentStep(1, torch.device("cpu"))
    step.begin(Batch(BatchRetentions.of(stages), np.array(computed), np.cumsum([0, *scheduled])))
    batch = metadata(computed, scheduled)
    (stage,) = step.stages
    assert stage is not None
    stage.set_ranks(batch.positions)
    seen = stage.metadata(batch, StepBuffer(torch.zeros(8, dtype=torch.int32)))
    slots = SlotMapping(128, torch.device("cpu"))
    stage.write_slots(slots, batch, torch.zeros(len(requests), 16, dtype=torch.int32), BLOCK_SIZE)
    lengths = seen.query_start_loc.diff()
    assert seen.query_start_loc.tolist() == seen.query_start_loc_cpu.tolist()
    assert len(seen.query_start_loc) == seen.num_reqs + 1 == len(requests) + 1
    assert (seen.query_start_loc[0], seen.query_start_loc[-1]) == (0, seen.num_actual_tokens)
    assert (lengths >= 0).all()
    assert lengths.max() <= seen.max_query_len
    assert seen.max_query_len > 1 or seen.num_actual_tokens == seen.num_reqs
    assert (lengths <= seen.seq_lens).all()
    assert (seen.seq_lens <= seen.max_seq_len).all()
    assert (slots.whole >= 0).tolist() == [index < seen.num_actual_tokens for index in range(128)]
    # What vLLM's backends make of it: decodes first, each of one token.
    for threshold in (1, 4):
        decodes, prefills, decode_tokens, prefill_tokens = split_decodes_and_prefills(
            seen, decode_threshold=threshold
        )
        assert decodes + prefills == seen.num_reqs
        assert decode_tokens + prefill_tokens == seen.num_actual_tokens
        assert (lengths[:decodes] <= threshold).all()
