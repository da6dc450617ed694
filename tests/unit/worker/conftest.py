# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A worker's current step, and metadata builders that belong to it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from tests.unit.worker.builders import BLOCK_SIZE, MAX_SEQS, MAX_TOKENS, PAGES, Backend
from vllm_vtw.worker.attention_backend import StageAttention, stage_backend
from vllm_vtw.worker.current_step import CurrentStep


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
