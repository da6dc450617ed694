"""What a stage's metadata builder hands to the builder of the model's own backend."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_vtw.retention import Retention
from vllm_vtw.worker.backend import StageAttention, stage_backend
from vllm_vtw.worker.plan import Batch
from vllm_vtw.worker.step import CurrentStep

BLOCK_SIZE = 4
# A picture at 2..9 in the first of two requests, whose prompt has 14 tokens; the second decodes its token 5.
RETENTIONS = [(Retention([(2, 10)]),), (Retention(),)]
BLOCK_TABLE = torch.tensor([[7, 8, 0], [3, 5, 0]], dtype=torch.int32)


class Builder(AttentionMetadataBuilder):
    supports_update_block_table = True

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata

    def update_block_table(self, metadata, blk_table, slot_mapping):
        return blk_table, slot_mapping


class Backend(AttentionBackend):
    get_name = get_impl_cls = staticmethod(lambda: None)

    @staticmethod
    def get_builder_cls():
        return Builder


@pytest.fixture
def step() -> CurrentStep:
    return CurrentStep(1, torch.device("cpu"))


@pytest.fixture
def builder(step):
    layer = StageAttention.__new__(StageAttention)
    torch.nn.Module.__init__(layer)
    layer.stage, layer.step = 1, step
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layer.4": layer}))
    spec = SimpleNamespace(stage=1, block_size=BLOCK_SIZE)
    return stage_backend(Backend).get_builder_cls()(spec, ["layer.4"], config, torch.device("cpu"))


@pytest.fixture
def common() -> CommonAttentionMetadata:
    return CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 14, 15]),
        query_start_loc_cpu=torch.tensor([0, 14, 15]),
        seq_lens=torch.tensor([14, 6]),
        num_reqs=2,
        num_actual_tokens=15,
        max_query_len=14,
        max_seq_len=14,
        block_table_tensor=BLOCK_TABLE,
        slot_mapping=torch.arange(15),
    )


EXPECTED_SLOTS = [28, 29, 30, 31, 32, 33, 21]  # ranks 0..5 in blocks 7 and 8, and rank 5 in block 5


def begin(step: CurrentStep) -> None:
    step.begin(Batch(RETENTIONS, np.array([0, 5]), np.array([14, 1])))


def test_the_stage_sees_what_it_retains(builder, step, common):
    begin(step)
    seen = builder.build(0, common)
    assert seen.query_start_loc.tolist() == [0, 6, 7]
    assert seen.seq_lens.tolist() == [6, 6]
    assert (seen.num_actual_tokens, seen.max_query_len, seen.max_seq_len) == (7, 6, 6)
    assert seen.slot_mapping.tolist() == EXPECTED_SLOTS
    assert step.slot_mappings["layer.4"] is seen.slot_mapping


def test_another_group_of_the_stage_gets_slots_of_its_own(builder, step):
    """What FlashAttention's groups of one stage go through after the first of them."""
    begin(step)
    other = BLOCK_TABLE + 10
    table, slots = builder.update_block_table("of the first group", other, torch.arange(15))
    assert table is other
    assert slots.tolist() == [slot + 10 * BLOCK_SIZE for slot in EXPECTED_SLOTS]
    assert step.slot_mappings["layer.4"] is slots


def test_a_dummy_run_is_left_as_it_is(builder, step, common):
    begin(step)
    step.begin(None)
    assert builder.build(0, common) is common
    assert step.slot_mappings == {}
