# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""An attention layer of a stage: its backend, its spec and its KV cache."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.unit.worker.builders import BLOCK_SIZE
from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.worker.attention_backend import StageAttention

GROUPS = LayerGroups((LayerGroup(0, 7, 1), LayerGroup(1, 2, 3)))


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
