# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Metadata builders of a stage over a backend that shows what it is given, and two batches for them."""

from types import SimpleNamespace

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_vtw.retention import OneStepPrefill, Retention
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.pages import PageStrides
from vllm_vtw.worker.step_plan import Batch, BatchRetentions

BLOCK_SIZE = 4
MAX_SEQS, MAX_TOKENS = 4, 20
# A picture at 2..9 in the first of two requests, whose prompt has 14 tokens; the second decodes its token 5.
ROWS = BatchRetentions.of([(Retention([(2, 10)]),), (Retention(),)])
BLOCK_TABLE = torch.tensor([[7, 8, 0], [3, 5, 0], [0, 0, 0]], dtype=torch.int32)
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


def slots_of(pages: list[int], ranks: range | list[int]) -> list[int]:
    """The slots of tokens with these ranks, in a row of these pages."""
    return [pages[rank // BLOCK_SIZE] * BLOCK_SIZE + rank % BLOCK_SIZE for rank in ranks]


class Leaving:
    """In place of gates: of the prompts that have stayed so far, the first one leaves before each stage."""

    def leave(self, stage: int, texts: list[torch.Tensor]) -> list[bool]:
        self.texts = [text.tolist() for text in texts]
        return [not row for row in range(len(texts))]


# Two prompts with one picture each, at 2..9 and at 1..2.
GATED = OneStepPrefill(2, 14, ((2, 10),), 10, True), OneStepPrefill(1, 5, ((1, 3),), 3, True)
