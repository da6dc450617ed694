# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which blocks are copied to the host and back, on made-up memory that remembers what was computed."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_cache_interface import KVCacheTensor
from vllm.v1.request import Request
from vllm.v1.simple_kv_offload.manager import SimpleCPUOffloadScheduler

from tests.unit.kv.managers import BLOCK_SIZE, MAX_MODEL_LEN, SPECS, Ask, asks, manager
from vllm_vtw.connectors.offload import StagedOffloadScheduler
from vllm_vtw.kv.stage_block_manager import StageManager

NUM_BLOCKS, ON_HOST = 64, 400
Content = tuple[int, tuple[Any, ...]]
"""A group, and everything that a block's tokens depend on: the tokens up to its last one."""


class Engine:
    """The managers of an engine that has room for one or two requests, and its memory."""

    def __init__(self, layout: str) -> None:
        self.gpu = manager(True, SPECS[layout], NUM_BLOCKS)
        for stage in self.gpu.stage_managers:
            stage.shares_parts = False
        config = self.gpu.kv_cache_config
        config.kv_cache_tensors = [
            KVCacheTensor(size=NUM_BLOCKS, layers=["layer.0"], layer_stride=1, block_stride=1, offset=0)
        ]
        vllm_config: Any = SimpleNamespace(
            kv_events_config=None,
            speculative_config=None,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, world_size=1),
            model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
            max_in_flight_tokens=MAX_MODEL_LEN,
            num_prefill_lookahead_tokens=0,
        )
        self.host = SimpleCPUOffloadScheduler(vllm_config, config, ON_HOST, BLOCK_SIZE, BLOCK_SIZE)
        StagedOffloadScheduler.adopt(self.host)
        self.host.bind_gpu_block_pool(self.gpu.block_pool)
        self.on_gpu: dict[int, Content] = {}
        self.on_host: dict[int, Content] = {}

    def rows(self, request: Request, tokens: list[Any], num_tokens: int) -> list[tuple[int, Content]]:
        """The whole blocks of a request's first tokens, and what they have to hold."""
        found = []
        for group, one in enumerate(self.gpu.coordinator.single_type_managers):
            kept = [*range(len(tokens))]
            if isinstance(one, StageManager) and one.stage > 0:
                retention = request.block_hashes.retentions[one.stage - 1]
                kept = [retention.position(rank) for rank in range(retention.count(len(tokens)))]
            held = [position for position in kept if position < num_tokens]
            for index, block in enumerate(
                one.req_to_blocks[request.request_id][: len(held) // one.block_size]
            ):
                last = held[(index + 1) * one.block_size - 1]
                found.append((block.block_id, (group, tuple(tokens[: last + 1]))))
        return found

    def serve(self, request: Request, tokens: list[Any]) -> tuple[int, int]:
        """Computes a request. The numbers of its tokens that the engine had, and that the host had."""
        for stage in self.gpu.stage_managers:
            stage.retentions = {request.request_id: request.block_hashes.retentions}
        blocks, local, _ = self.gpu.get_computed_blocks(request)
        external, _ = self.host.get_num_new_matched_tokens(request, local)
        assert external is not None
        assert self.gpu.allocate_slots(
            request,
            0 if external else request.num_tokens - local,
            local,
            blocks,
            num_external_computed_tokens=external,
            delay_cache_blocks=external > 0,
        )
        held = KVCacheBlocks(self.gpu.coordinator.get_blocks(request.request_id))
        self.host.update_state_after_alloc(request, held, external)
        if external:
            load = self.host._reqs_to_load[request.request_id]
            for to, source in zip(
                load.transfer_meta.gpu_block_ids, load.transfer_meta.cpu_block_ids, strict=True
            ):
                self.on_gpu[to] = self.on_host[source]
            load.load_event = 0
            self.host._cleanup_load_request(request.request_id)
            for block, content in self.rows(request, tokens, local + external):
                assert self.on_gpu[block] == content
            request.num_computed_tokens = local + external
            self.gpu.cache_blocks(request, local + external)
            assert self.gpu.allocate_slots(request, request.num_tokens - local - external)
        request.num_computed_tokens = request.num_tokens
        self.on_gpu |= dict(self.rows(request, tokens, request.num_tokens))
        ids = tuple(
            [block.block_id for block in row] for row in self.gpu.coordinator.get_blocks(request.request_id)
        )
        self.host.request_finished_all_groups(request, ids)
        self.gpu.free(request)
        for transfer in self.host._pending_finished_stores:
            for source, to in zip(transfer.gpu_block_ids, transfer.cpu_block_ids, strict=True):
                self.on_host[to] = self.on_gpu[source]
            self.host._in_flight_store_gpu_blocks.difference_update(transfer.gpu_block_ids)
            self.host._process_store_completion(transfer.gpu_block_ids, transfer.cpu_block_ids)
        self.host._pending_finished_stores.clear()
        return local, external


def tokens_of(ask: Ask) -> list[Any]:
    return [
        (kind, size, offset) if kind in ("cat", "dog") else kind
        for kind, size in ask.pieces
        for offset in range(size)
    ]


LAYOUTS = pytest.mark.parametrize("layout", ["one page", "pages", "pages in stage 0"])


@LAYOUTS
@given(
    course=st.lists(st.tuples(asks(most=5), st.booleans()), min_size=3, max_size=10),
    align_to=st.sampled_from([1, BLOCK_SIZE]),
)
def test_what_comes_back_is_what_was_computed(layout: str, course: list[tuple[Ask, bool]], align_to: int):
    engine = Engine(layout)
    for number, (ask, loses_its_cache) in enumerate(course):
        if loses_its_cache:
            engine.gpu.block_pool.reset_prefix_cache()
        request = ask.request(str(number), (ask.prompt.retention(align_to),) * 2)
        engine.serve(request, tokens_of(ask))
        assert engine.gpu.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1


@LAYOUTS
def test_an_image_that_the_engine_has_lost_comes_back(layout: str):
    engine = Engine(layout)
    first = Ask((("text", 8), ("cat", 24), ("cat", 24), *[("text", 20)] * 4))
    others = [Ask((("question", size), ("dog", 20), ("dog", 20), ("text", 20))) for size in (3, 8, 20)]
    served = []
    for number, ask in enumerate([first, *others, *others, first]):
        request = ask.request(str(number), (ask.prompt.retention(BLOCK_SIZE),) * 2)
        served.append(engine.serve(request, tokens_of(ask)))
        engine.gpu.block_pool.reset_prefix_cache()
    assert served[0] == (0, 0)
    local, external = served[-1]
    assert local == 0
    # A block with several pages is shared as a whole only.
    whole = (first.starts[-1] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert external == whole if layout == "one page" else 0 < external <= whole
