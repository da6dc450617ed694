# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a stage's metadata builder hands to the builder of the model's own backend."""

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.retention import OneStepPrefill, Retention
from vllm_vtw.worker.attention_backend import StageAttention, stage_backend
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.pages import PageStrides
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer
from vllm_vtw.worker.step_plan import Batch, BatchRetentions

BLOCK_SIZE = 4
MAX_SEQS, MAX_TOKENS = 4, 20
# A picture at 2..9 in the first of two requests, whose prompt has 14 tokens; the second decodes its token 5.
ROWS = BatchRetentions.of([(Retention([(2, 10)]),), (Retention(),)])
BLOCK_TABLE = torch.tensor([[7, 8, 0], [3, 5, 0], [0, 0, 0]], dtype=torch.int32)
GROUPS = LayerGroups((LayerGroup(0, 7, 1), LayerGroup(1, 2, 3)))
# In groups with several pages, page j of block b has number b + 100 * j.
PAGES = PageStrides(block=1, page=100)


class Builder(AttentionMetadataBuilder):
    """Builds what it is given, with the block table under the name that backends' metadata have for it."""

    supports_update_block_table = True
    _cudagraph_support = AttentionCGSupport.ALWAYS
    builds = 0

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        self.builds += 1
        return SimpleNamespace(
            **vars(common_attn_metadata), block_table=common_attn_metadata.block_table_tensor
        )


class Backend(AttentionBackend):
    get_name = get_impl_cls = staticmethod(lambda: None)

    @staticmethod
    def get_builder_cls():
        return Builder


@pytest.fixture(autouse=True, scope="module")
def platform():
    """What a worker does before it builds a model."""
    current_platform.register_triton_kernel_overrides()


@pytest.fixture
def step() -> CurrentStep:
    return CurrentStep(1, torch.device("cpu"))


@pytest.fixture
def make_builder(step):
    def make(layer_name: str, stage: int = 1, pages: int = 1, step: CurrentStep = step):
        layer = StageAttention.__new__(StageAttention)
        torch.nn.Module.__init__(layer)
        layer.step, layer.page_strides = step, PAGES
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={layer_name: layer}),
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS),
        )
        spec = SimpleNamespace(stage=stage, block_size=BLOCK_SIZE, pages=pages)
        return stage_backend(Backend).get_builder_cls()(spec, [layer_name], config, torch.device("cpu"))

    return make


@pytest.fixture
def builder(make_builder):
    return make_builder("layer.4")


def metadata(computed: list[int], scheduled: list[int], padded_rows: int = 0) -> CommonAttentionMetadata:
    """The batch as a runner describes it, of requests with `computed` tokens and `scheduled` more."""
    seq_lens = [*np.add(computed, scheduled).tolist(), *[0] * padded_rows]
    starts = np.cumsum([0, *scheduled, *[0] * padded_rows]).tolist()
    positions = [p for c, s in zip(computed, scheduled, strict=True) for p in range(c, c + s)]
    num_tokens = len(positions) + padded_rows
    return CommonAttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(seq_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(scheduled),
        max_seq_len=max(seq_lens),
        block_table_tensor=BLOCK_TABLE[: len(seq_lens)],
        slot_mapping=torch.arange(num_tokens),
        positions=torch.tensor([*positions, *[0] * padded_rows]),
    )


def begin(step: CurrentStep, computed: list[int], scheduled: list[int], **options) -> None:
    step.begin(Batch(ROWS, np.array(computed), np.cumsum([0, *scheduled])), **options)


PREFILL = ([0, 5], [14, 1])
PREFILL_SLOTS = [28, 29, 30, 31, 32, 33, 21]  # ranks 0..5 in blocks 7 and 8, and rank 5 in block 5
DECODE = ([14, 6], [1, 1])
DECODE_SLOTS = [34, 22]  # rank 6 in block 8, and rank 6 in block 5


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


def slots_of(pages: list[int], ranks: range | list[int]) -> list[int]:
    """The slots of tokens with these ranks, in a row of these pages."""
    return [pages[rank // BLOCK_SIZE] * BLOCK_SIZE + rank % BLOCK_SIZE for rank in ranks]


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


def test_a_backend_that_is_not_supported_is_refused(step):
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.attn_backend = SimpleNamespace(get_name=lambda: "FLASHINFER")
    with pytest.raises(ValueError, match="backend FLASHINFER: set --attention-backend to one of FLASH_ATTN"):
        StageAttention.adopt(attention, GROUPS, GROUPS.groups[1], step)


def test_a_layer_of_a_stage_knows_its_pages(step, monkeypatch):
    """It tells them to the scheduler in its spec, and to kernels in the KV cache that it binds."""
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    StageAttention.adopt(attention, GROUPS, GROUPS.groups[1], step)
    assert isinstance(attention, StageAttention)
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    monkeypatch.setattr(Attention, "get_kv_cache_spec", lambda self, config: spec)
    monkeypatch.setattr(Attention, "bind_kv_cache", lambda self, cache: setattr(self, "bound", cache))
    found = attention.get_kv_cache_spec(None)
    assert found == StageSpec.like(spec, GROUPS, GROUPS.groups[1])
    assert (found.stage, found.pages, found.width) == (1, 3, 7)
    # Five blocks of layer 0, in a layout with all blocks of seven layers one after the other.
    cache = torch.zeros(7, 5, 1, BLOCK_SIZE, 2)
    attention.bind_kv_cache(cache[0])
    assert attention.page_strides == (1, 5)
    attention.bound[4 + 2 * 5] = 1.0
    assert cache.sum((2, 3, 4)).nonzero().tolist() == [[2, 4]]


def test_only_kv_cache_keeps_the_memory_of_the_kv_cache(step):
    """vLLM releases it by resetting that attribute, after it has measured CUDA graphs and at shutdown."""
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.attn_backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    StageAttention.adopt(attention, GROUPS, GROUPS.groups[1], step)
    memory = torch.zeros(7, 5, 1, BLOCK_SIZE, 2)
    attention.bind_kv_cache(memory[0])
    released = weakref.ref(attention.kv_cache)
    attention.kv_cache = torch.tensor([])
    assert released() is None


class Leaving:
    """In place of gates: of the prompts that have stayed so far, the first one leaves before each stage."""

    def leave(self, stage: int, texts: list[torch.Tensor]) -> list[bool]:
        self.texts = [text.tolist() for text in texts]
        return [not row for row in range(len(texts))]


# Of pictures at 2..9 and at 1..2.
GATED = OneStepPrefill(2, 14, ((2, 10),), 10, True), OneStepPrefill(1, 5, ((1, 3),), 3, True)


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
