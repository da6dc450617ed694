# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Positions of M-RoPE keep the strides that code was compiled for, whatever tokens have left."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CUDAGraphMode

from vllm_vtw.models.graph_inputs import GraphInputs

TOKENS, HIDDEN = 32, 4


def graph_inputs(sizes: list[int]) -> GraphInputs:
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if sizes else CUDAGraphMode.NONE
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=sizes),
        model_config=SimpleNamespace(
            uses_mrope=True, mrope_num_dims=3, dtype=torch.float32, get_hidden_size=lambda: HIDDEN
        ),
        lora_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
    )
    return GraphInputs(config, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [[], [8, 16]])
@given(data=st.data())
def test_strides(sizes, data):
    inputs = graph_inputs(sizes)
    of_runner = torch.zeros(3, TOKENS + 1, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, TOKENS))
        kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
        of_runner[:, :count] = torch.randint(0, 1000, (3, count))
        positions = of_runner[:, :count][..., kept]
        size = inputs.size(len(kept))
        if size is None:
            written = inputs.write_positions(len(kept), positions)
        else:
            states = torch.zeros(len(kept), HIDDEN)
            written, hidden, residual = inputs.write(size, positions, states, states)
            assert residual is not None
            assert len(hidden) == len(residual) == size
            assert inputs.write(size, positions, states, None)[2] is None, "before layer 0"
        assert torch.equal(written[:, : len(kept)], positions)
        # As those of vLLM's own buffer, of which the runner gives the model the first columns.
        assert written.stride() == of_runner[:, :count].stride()
        assert written.data_ptr() == inputs.positions.data_ptr()
