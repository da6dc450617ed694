# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's manager of all KV-cache groups, with counts that are right where stages hold fewer tokens."""

from collections import Counter
from collections.abc import Iterable

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, KVCacheBlockCopy
from vllm.v1.request import Request

from vllm_vtw.kv.rank_pools import RankCopy, give_each_rank_a_pool
from vllm_vtw.kv.stage_block_manager import StageManager


class StagedKVCacheManager(KVCacheManager):
    """Counts cached tokens in tokens of the prompt, and held blocks by stage."""

    @classmethod
    def adopt(cls, manager: KVCacheManager) -> None:
        """Changes the class of the manager that vLLM's scheduler has made."""
        assert type(manager) is KVCacheManager, f"unexpected KV-cache manager {type(manager).__name__}"
        manager.__class__ = cls
        assert isinstance(manager, cls)
        if len({stage.kv_cache_spec.rank for stage in manager.stage_managers}) > 1:
            give_each_rank_a_pool(manager.coordinator)

    @property
    def stage_managers(self) -> list[StageManager]:
        """The managers of all groups but those of stage 0 that are stored as in stock vLLM."""
        managers = self.coordinator.single_type_managers
        return [manager for manager in managers if isinstance(manager, StageManager)]

    def held_blocks(self) -> Counter[int]:
        """The blocks that requests hold, by stage. A block that several requests share counts once."""
        held: Counter[int] = Counter()
        for manager in self.stage_managers:
            held[manager.stage] += manager.num_held_blocks
        held[0] += self._held_as_in_stock()
        return held

    def pages_in_stock(self, running: Iterable[Request]) -> int:
        """The pages that each layer would hold in stock vLLM, which are those of stage 0.

        If all blocks of stage 0 hold several pages, unused ones count, too. If it has no layers, pages that
        requests share count for each of them.

        Args:
            running: The requests that are running.
        """
        managers = len(self.coordinator.single_type_managers) - len(self.stage_managers)
        if managers:
            return self._held_as_in_stock() // managers
        of_stage_0 = [manager for manager in self.stage_managers if not manager.stage]
        if not of_stage_0:
            page_size = self.stage_managers[0].page_size
            return sum(cdiv(request.num_computed_tokens, page_size) for request in running)
        return min(manager.num_held_blocks * manager.pages for manager in of_stage_0)

    def _held_as_in_stock(self) -> int:
        """The blocks that requests hold in groups whose manager is vLLM's own."""
        if len(self.stage_managers) == len(self.coordinator.single_type_managers):
            return 0
        # vLLM keeps one block of the pool, the null block, for itself.
        in_use = self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()
        return in_use - sum(manager.num_held_blocks for manager in self.stage_managers)

    @property
    def usage(self) -> float:
        """The fraction of blocks that are in use, on the pipeline rank where it is the largest."""
        pools = {manager.block_pool for manager in self.coordinator.single_type_managers}
        usage: float = max(pool.get_usage() for pool in pools)
        return usage

    def take_kv_cache_block_copies(self) -> tuple[list[KVCacheBlockCopy], list[KVCacheBlock]]:
        """vLLM's copies of blocks, each with the pipeline rank that makes it."""
        copies: list[KVCacheBlockCopy] = []
        for manager in self.stage_managers:
            for source, target in manager._pending_cow_copies:
                copy = RankCopy(source.block_id, target.block_id)
                copy.rank = manager.kv_cache_spec.rank
                copies.append(copy)
        _, retained = super().take_kv_cache_block_copies()
        return copies, retained

    def estimate_cached_tokens(self, request: Request) -> int:
        """How many tokens of the prompt another request that begins with the same tokens would find cached.

        vLLM's estimate is the length of the shortest row. That is too low here, as the row of a deep stage
        does not contain withdrawn tokens.
        """
        managers = self.coordinator.single_type_managers
        others = [manager for manager in managers if not isinstance(manager, StageManager)]
        tokens = min(
            (manager.num_cached_block.get(request.request_id, 0) * manager.block_size for manager in others),
            default=request.num_tokens,
        )
        # A cache hit ends at a position where a page ends in every row, so one row may shorten what another
        # one offers.
        while stages := [manager.cached_tokens(request, tokens) for manager in self.stage_managers]:
            if min(stages) == tokens:
                break
            tokens = min(stages)
        return tokens
