# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""KV blocks that go to the host's memory and come back, through a stand-in for CUDA's copies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.simple_kv_offload import worker

from tests.engine.engines import (
    BLOCK_SIZE,
    FILLER,
    MODEL,
    Ask,
    assert_follows,
    free_blocks,
    picture,
    running,
    step_until,
)
from tests.engine.test_refusals import configure
from vllm_vtw.startup import connectors


class Event:
    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Copies:
    """In place of `DmaCopyBackend`: copies at once."""

    def init(self, engine: dict, host: dict, *_: Any) -> None:
        self.pairs = [(engine[name], host[name]) for name in engine]

    loaded = 0
    """Blocks that came back."""

    def launch_copy(self, sources, to, is_store, event_idx, events_list, wait_event=None) -> None:
        for pair in self.pairs:
            source, target = pair if is_store else pair[::-1]
            target[to] = source[sources]
        Copies.loaded += 0 if is_store else len(to)
        events_list.append((event_idx, Event()))

    def shutdown(self) -> None: ...


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    platform = SimpleNamespace(is_cuda_alike=lambda: True, is_cpu=lambda: True, device_name="cpu")
    monkeypatch.setattr(connectors, "current_platform", platform)
    stream = SimpleNamespace(priority_range=lambda: (0, 0))
    cuda = SimpleNamespace(Stream=SimpleNamespace, current_stream=lambda: None)
    cuda.Stream = type(
        "Stream", (), {"__init__": lambda self, priority: None, "priority_range": stream.priority_range}
    )
    names = {name: getattr(torch, name) for name in ("Tensor", "empty", "int8", "zeros", "device")}
    monkeypatch.setattr(worker, "torch", SimpleNamespace(**names, cuda=cuda, Event=Event))
    monkeypatch.setattr(worker, "DmaCopyBackend", Copies)


@pytest.mark.parametrize(
    ("vtw", "comes_back"),
    [
        ({"layer": 4, "align": True}, True),
        pytest.param({"layers": [4, 6], "layer": 4, "align": True}, True, marks=pytest.mark.slow),
        # At K = 7, blocks of the last layer hold seven pages, and none is full.
        pytest.param({"layer": 7, "align": True}, False, marks=pytest.mark.slow),
    ],
)
def test_an_image_that_the_engine_has_lost_comes_back(checkpoint, reference, vtw, comes_back):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    asks = [
        Ask(str(seed), f"USER: {FILLER}<image>\n{FILLER}What is this? ASSISTANT:", (picture(seed),))
        for seed in range(6)
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    # The engine has room for three of the requests.
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 2 << 20, "kv_offloading_size": 0.05}
    cached = []
    with running(folder, vtw, enable_prefix_caching=True, **options) as llm:
        all_free = free_blocks(llm)
        for ask in [*asks, *asks]:
            before = Copies.loaded
            output = llm.generate([ask.to_vllm(oracle)], params, use_tqdm=False)[0]
            prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
            assert_follows(oracle, ask, prompt, answer, vtw["layer"], BLOCK_SIZE)
            cached.append((output.num_cached_tokens, Copies.loaded - before))
        step_until(llm, lambda: free_blocks(llm) == all_free)
    assert cached[:6] == [(0, 0)] * 6
    for tokens, loaded in cached[6:]:
        assert (tokens > 100 and loaded > 4) == comes_back


def test_a_layer_with_which_no_blocks_of_the_first_layers_are_as_in_stock_vllm(checkpoint):
    with pytest.raises(ValueError, match=r"cannot offload KV blocks .* withdraw at a deeper layer"):
        configure(checkpoint(MODEL), kv_offloading_size=0.05, additional_config={"vtw": {"layer": 2}})
