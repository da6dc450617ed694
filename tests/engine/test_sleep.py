# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What an engine keeps while it sleeps. The CPU backend cannot: the test drops what vLLM drops on CUDA."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from tests.engine.engines import GREEDY, MODEL, SHAPES, running
from tests.engine.gates import assert_gated, dividing
from vllm_vtw.models.graph_inputs import GraphInputs


def tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that the plugin's own objects hold, however deep."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: Any = ()
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    elif type(value).__module__.startswith("vllm_vtw."):
        inside = vars(value).values()
    for one in inside:
        yield from tensors_of(one, seen)


def spoil(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1 << 20)


@pytest.fixture
def made_with_the_weights(monkeypatch) -> list[torch.Tensor]:
    """Tensors of the plugin that are there once the model is loaded: what vLLM allocates as weights."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    found: list[torch.Tensor] = []
    load = CPUModelRunner.load_model

    def load_and_note(self, *args, **options):
        load(self, *args, **options)
        found.extend(tensors_of(self.get_model(), set()))

    monkeypatch.setattr(CPUModelRunner, "load_model", load_and_note)
    return found


def test_gates_and_answers_outlast_a_sleep_of_level_2(checkpoint, reference, tmp_path, made_with_the_weights):
    """At level 2 vLLM drops what was allocated with the weights, and keeps registered buffers. Then weights
    are loaded again."""
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    gates = dividing(tmp_path, oracle)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    with running(folder, gates.options, max_num_batched_tokens=640) as llm:
        before = llm.generate(prompts, GREEDY, use_tqdm=False)
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert any(name.startswith("vtw_gates.") for name in kept)
        spoil([*made_with_the_weights, *model.buffers(), *model.parameters()])
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        llm.collective_rpc("reload_weights")
        llm.llm_engine.reset_encoder_cache()
        after = llm.generate(prompts, GREEDY, use_tqdm=False)
    for ask, one, other in zip(SHAPES, before, after, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert_gated(oracle, ask, other, gates)


def test_the_inputs_of_graphs_are_buffers():
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=[1, 2, 8]
    )
    model = SimpleNamespace(get_hidden_size=lambda: 16, dtype=torch.float32, uses_mrope=False)
    config: Any = SimpleNamespace(compilation_config=compilation, model_config=model, lora_config=None)
    inputs = GraphInputs(config, torch.device("cpu"))
    assert {name: len(buffer) for name, buffer in inputs.named_buffers()} == dict.fromkeys(
        ("positions", "hidden", "residual"), 8
    )
    assert not inputs.state_dict()
    registered = {buffer.data_ptr() for buffer in inputs.buffers()}
    assert {tensor.data_ptr() for tensor in tensors_of(inputs, set())} <= registered
    assert len({*registered}) == 3
