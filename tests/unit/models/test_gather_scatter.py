# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What lies between a decoder's segments, and between pipeline ranks."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from vllm.config import CUDAGraphMode

from vllm_vtw.models.gather_scatter import TokenStates
from vllm_vtw.models.graph_inputs import GraphInputs
from vllm_vtw.worker.stage_step import StageStep


def graph_inputs(mode: CUDAGraphMode) -> GraphInputs:
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 4, uses_mrope=False)
    compilation = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[32, 8, 16])
    return GraphInputs(
        SimpleNamespace(compilation_config=compilation, model_config=model, lora_config=None),
        torch.device("cpu"),
    )


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (9, 16), (32, 32), (33, None)])
def test_the_smallest_graph_that_is_large_enough(rows, size):
    assert graph_inputs(CUDAGraphMode.FULL_AND_PIECEWISE).size(rows) == size


def test_no_piecewise_graphs():
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY):
        assert graph_inputs(mode).size(1) is None


def test_inputs_lie_where_those_before_lay():
    inputs = graph_inputs(CUDAGraphMode.PIECEWISE)
    first: Any = inputs.write(8, torch.arange(8), torch.ones(8, 4), torch.ones(8, 4))
    second: Any = inputs.write(8, torch.arange(3) + 100, torch.full((3, 4), 2.0), torch.full((3, 4), 3.0))
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in second]
    assert second[0].tolist() == [100, 101, 102, 3, 4, 5, 6, 7]
    assert second[1][:, 0].tolist() == [2.0] * 3 + [1.0] * 5
    assert second[2][:, 0].tolist() == [3.0] * 3 + [1.0] * 5


def test_the_runner_may_settle_on_piecewise_graphs_later():
    inputs = graph_inputs(CUDAGraphMode.FULL)
    assert inputs.size(5) is None
    inputs.compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    size = inputs.size(5)
    assert size == 8
    assert len(inputs.write(size, torch.arange(5), torch.ones(5, 4), torch.ones(5, 4))[1]) == 8


def stage(kept: list[int] | None, gather: list[int] | None) -> StageStep:
    """As much of a stage's plan as its border needs."""
    of_batch, of_stage_before = (None if at is None else torch.tensor(at) for at in (kept, gather))
    return cast(StageStep, SimpleNamespace(kept=of_batch, gather=of_stage_before))


def test_tokens_that_leave_before_the_first_layer():
    """They have no residual yet, and the runner's embeddings are not written to."""
    embeddings = torch.rand(5, 4)
    before = embeddings.clone()
    states = TokenStates(embeddings, residual=None)
    states.gather(stage([0, 3, 4], [0, 3, 4]), keep_withdrawn_states=True)
    assert states.residual is None
    states.hidden, states.residual = states.hidden + 1, torch.ones(3, 4)
    states.gather(stage([0, 4], [0, 2]), keep_withdrawn_states=True)
    states.hidden, states.residual = states.hidden + states.residual, None
    states.scatter(5, norm=nn.Identity())
    assert states.hidden.equal(before + torch.tensor([2.0, 0, 0, 2, 2])[:, None])
    assert embeddings.equal(before)


@pytest.mark.parametrize("keep_withdrawn_states", [False, True])
def test_tokens_are_gathered_at_borders_and_scattered_back(keep_withdrawn_states):
    """Two borders: of five tokens 0, 3 and 4 stay, and then 0 and 4; a third stage computes the same."""
    hidden, residual = torch.rand(5, 4), torch.rand(5, 4)
    states = TokenStates(hidden.clone(), residual.clone())
    states.gather(None, keep_withdrawn_states)
    assert states.kept is None
    states.gather(stage([0, 3, 4], [0, 3, 4]), keep_withdrawn_states)
    assert states.residual is not None
    states.hidden, states.residual = states.hidden + 1, states.residual + 1
    states.gather(stage([0, 4], [0, 2]), keep_withdrawn_states)
    states.gather(stage([0, 4], None), keep_withdrawn_states)
    assert states.hidden.equal(hidden[[0, 4]] + 1)
    assert states.residual.equal(residual[[0, 4]] + 1)

    states.scatter(5, norm=None)
    assert states.kept is None
    assert states.hidden[[0, 4]].equal(hidden[[0, 4]] + 1)
    assert states.residual[[0, 4]].equal(residual[[0, 4]] + 1)
    left = states.hidden + states.residual
    if keep_withdrawn_states:
        assert left[[1, 2]].equal((hidden + residual)[[1, 2]])
        assert left[3].allclose((hidden + residual)[3] + 2)
    else:
        assert not left[[1, 2, 3]].any()


def test_the_next_rank_goes_on_with_what_the_rank_before_scattered():
    """It knows nothing of the stages before its own, so it gathers by the indices in the batch.

    Both model runners copy what they receive into the first rows of buffers, one for each of the batch's
    tokens, which may be padded: here 5 tokens in 6 rows.
    """
    hidden, residual = torch.rand(6, 4), torch.rand(6, 4)
    first = TokenStates(hidden.clone(), residual.clone())
    first.gather(stage([0, 3, 4], [0, 3, 4]), keep_withdrawn_states=True)
    first.scatter(6, norm=None)
    assert first.residual is not None
    buffers = torch.rand(2, 8, 4)
    received = [
        buffer[:6].copy_(sent[:6])
        for buffer, sent in zip(buffers, (first.hidden, first.residual), strict=True)
    ]
    second = TokenStates(*received)
    second.gather(stage([0, 4], [0, 2]), keep_withdrawn_states=True)
    assert second.hidden.equal(hidden[[0, 4]])
    assert second.residual is not None
    assert second.residual.equal(residual[[0, 4]])
    second.hidden, second.residual = second.hidden + second.residual, None
    second.scatter(6, norm=nn.Identity())
    assert second.hidden[:5].allclose((hidden + residual)[:5])


def test_a_batch_without_withdrawn_tokens_is_left_alone():
    hidden, residual = torch.rand(5, 4), torch.rand(5, 4)
    states = TokenStates(hidden, residual)
    states.gather(stage(None, None), keep_withdrawn_states=True)
    states.scatter(5, norm=nn.Identity())
    assert states.hidden is hidden
    assert states.residual is residual
