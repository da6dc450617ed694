"""vLLM's KV-cache manager where a stage's rows are shorter than requests: counts for bills and metrics."""

from collections import Counter

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_vtw.kv.manager import StageManager


class StagedKVCacheManager(KVCacheManager):
    """vLLM's manager of all groups. It counts what is shared in prompt tokens, and what is held by stage."""

    @classmethod
    def adopt(cls, manager: KVCacheManager) -> None:
        """Turns the manager that vLLM's scheduler has made into one that knows stages."""
        assert type(manager) is KVCacheManager, f"unexpected KV-cache manager {type(manager).__name__}"
        manager.__class__ = cls

    @property
    def stage_managers(self) -> list[StageManager]:
        """Those of the stages past the first."""
        managers = self.coordinator.single_type_managers
        return [manager for manager in managers if isinstance(manager, StageManager)]

    def held_blocks(self) -> Counter[int]:
        """By stage, the blocks that requests hold in all groups of the stage together, each counted once."""
        held: Counter[int] = Counter()
        for manager in self.stage_managers:
            held[manager.kv_cache_spec.stage] += manager.num_held_blocks
        # vLLM keeps one block of the pool for itself.
        in_use = self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()
        held[0] = in_use - held.total()
        return held

    def estimate_cached_tokens(self, request: Request) -> int:
        """How many of a request's tokens, from the first on, another request with the same ones would find.

        vLLM's estimate takes the length of the shortest row for it, in which withdrawn tokens do not count.
        """
        managers = self.coordinator.single_type_managers
        whole = [manager for manager in managers if not isinstance(manager, StageManager)]
        tokens = min(
            manager.num_cached_block.get(request.request_id, 0) * manager.block_size for manager in whole
        )
        # A hit ends where every row has a border, so that one row may shorten what another one offers.
        while stages := [manager.shared_tokens(request, tokens) for manager in self.stage_managers]:
            if min(stages) == tokens:
                break
            tokens = min(stages)
        return tokens
