# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's connector that offloads KV blocks to the host, with rows of stages that hold fewer tokens.

vLLM's own finds the block of a token by the token's position. Here, the managers of the stages look up the
rows of a request, under the same keys as in the engine's own prefix cache. A hit is one in all stages.
"""

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.simple_kv_offload.manager import (
    LoadRequestState,
    SimpleCPUOffloadScheduler,
    StoreRequestState,
    TransferMeta,
    _StoreAdmission,
)

from vllm_vtw.kv.stage_block_manager import StagedBlockHashes, StageManager
from vllm_vtw.retention import of_stage


class StagedOffloadScheduler(SimpleCPUOffloadScheduler):
    """Chooses the blocks that are copied to the host and back."""

    @classmethod
    def adopt(cls, scheduler: SimpleCPUOffloadScheduler) -> None:
        """Changes the class of the scheduler that vLLM's connector has made."""
        assert type(scheduler) is SimpleCPUOffloadScheduler, f"unexpected {type(scheduler).__name__}"
        scheduler.__class__ = cls

    def _blocks_of(self, request: Request, group: int, num_tokens: int) -> tuple[int, int]:
        """The numbers of whole and of all blocks that a group has for a request's first tokens."""
        manager = self.cpu_coordinator.single_type_managers[group]
        if isinstance(manager, StageManager):
            hashes = request.block_hashes
            assert isinstance(hashes, StagedBlockHashes)
            num_tokens = of_stage(hashes.retentions, manager.stage).count(num_tokens)
        return num_tokens // manager.block_size, -(-num_tokens // manager.block_size)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if stale := self._pending_cpu_hits.pop(request.request_id, None):
            self._free_pending_cpu_hit(stale)
        if request.skip_reading_prefix_cache:
            return 0, False
        rows, hit_length, _ = self.cpu_coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        if hit_length <= num_computed_tokens:
            return 0, False
        # The engine has the first blocks of each row itself.
        rows = tuple(
            row[self._blocks_of(request, group, num_computed_tokens)[0] :] for group, row in enumerate(rows)
        )
        self.cpu_block_pool.touch([block for row in rows for block in row])
        num_tokens = hit_length - num_computed_tokens
        self._pending_cpu_hits[request.request_id] = (rows, num_tokens, num_computed_tokens)
        return num_tokens, True

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        pending = self._pending_cpu_hits.pop(request.request_id, None)
        super().update_state_after_alloc(request, blocks, 0)
        if pending is None:
            return
        rows, _, num_computed_tokens = pending
        gpu_pool, to, sources = self._gpu_block_pool, [], []
        assert gpu_pool is not None
        if num_external_tokens:
            for group, ids in enumerate(blocks.get_block_ids()):
                first = self._blocks_of(request, group, num_computed_tokens)[0]
                stop = self._blocks_of(request, group, num_computed_tokens + num_external_tokens)[1]
                to += ids[first:stop]
                sources += rows[group][: stop - first]
            self.cpu_block_pool.touch(sources)
            gpu_pool.touch([gpu_pool.blocks[block] for block in to])
            transfer = TransferMeta(to, [block.block_id for block in sources])
            self._reqs_to_load[request.request_id] = LoadRequestState(request, transfer)
        self._free_pending_cpu_hit(pending)

    def _select_eager_blocks_to_store(
        self, state: StoreRequestState, block_ids_by_group: tuple[list[int], ...]
    ) -> tuple[list[int], list[int], None]:
        """The blocks of a request that are full, computed and not on the host yet."""
        gpu_pool = self._gpu_block_pool
        assert gpu_pool is not None
        request = state.request
        chosen: list[int] = []
        advanced = [0] * len(block_ids_by_group)
        confirmed = request.num_computed_tokens - request.num_output_placeholders
        num_free = self.cpu_block_pool.get_num_free_blocks()
        for group, ids in enumerate(block_ids_by_group):
            whole, _ = self._blocks_of(request, group, confirmed)
            for block in ids[state.num_stored_blocks[group] : whole]:
                if self._classify_store_candidate(gpu_pool.blocks[block]) is _StoreAdmission.READY:
                    if len(chosen) == num_free:
                        break
                    chosen.append(block)
                advanced[group] += 1
        return chosen, advanced, None


class StagedOffloadConnector(SimpleCPUOffloadConnector):
    """Offloads blocks of all stages. Withdrawn tokens take no memory of the host, either."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.scheduler_manager is not None:
            StagedOffloadScheduler.adopt(self.scheduler_manager)
