"""The buffers between a decoder's segments, and between pipeline ranks."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode

from vllm_vtw.models.graph_inputs import GraphInputs
from vllm_vtw.models.received import KEYS, received_buffers, received_rows


def graph_inputs(mode: CUDAGraphMode) -> GraphInputs:
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 4)
    compilation = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[32, 8, 16])
    return GraphInputs(
        SimpleNamespace(compilation_config=compilation, model_config=model), torch.device("cpu")
    )


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (9, 16), (32, 32), (33, None)])
def test_the_smallest_graph_that_is_large_enough(rows, size):
    assert graph_inputs(CUDAGraphMode.FULL_AND_PIECEWISE).size(rows) == size


def test_no_piecewise_graphs():
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY):
        assert graph_inputs(mode).size(1) is None


def test_inputs_lie_where_those_before_lay():
    inputs = graph_inputs(CUDAGraphMode.PIECEWISE)
    first = inputs.write(8, torch.arange(8), torch.ones(8, 4), torch.ones(8, 4))
    second = inputs.write(8, torch.arange(3) + 100, torch.full((3, 4), 2.0), torch.full((3, 4), 3.0))
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


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_a_rank_takes_as_many_rows_as_come(rows):
    """Both model runners copy into the first rows of a buffer, one for each of the batch's 5 tokens."""
    buffers = received_buffers(8, 4, torch.float32, torch.device("cpu"))
    sent = torch.rand(rows, 4)
    taken = {key: buffers[key][:5].copy_(sent[:5], non_blocking=True) for key in KEYS}
    assert all(len(rows) == 5 for rows in taken.values())
    for key in KEYS:
        assert torch.equal(received_rows(buffers, key, rows), sent)
        assert received_rows(buffers[:5], key, 5).data_ptr() == buffers[key].data_ptr()
        assert type(received_rows(buffers, key, rows)) is torch.Tensor
