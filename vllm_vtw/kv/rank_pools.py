# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A block pool for every pipeline rank.

In vLLM, a block that a request holds takes memory on every pipeline rank, also where the block's group has no
layers. With stages that costs much: if stage 0 is on one rank and stage 1 on another, each rank would reserve
memory for both. Here, every group belongs to one rank, and the blocks of a rank are counted apart.
"""

import functools
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy


class RankCopy(KVCacheBlockCopy):
    """A copy of a block that only one pipeline rank makes.

    Attributes:
        rank: The pipeline rank.
    """

    rank: int


def give_each_rank_a_pool(coordinator: KVCacheCoordinator) -> None:
    """Gives the groups of every pipeline rank but the first a block pool of their own, before any is used.

    Args:
        coordinator: vLLM's coordinator of the groups' managers, all of which are `StageManager`s.
    """
    pools = {0: coordinator.block_pool}
    for manager in coordinator.single_type_managers:
        rank = manager.kv_cache_spec.rank
        if rank not in pools:
            of_first = coordinator.block_pool
            pools[rank] = BlockPool(
                of_first.num_gpu_blocks, of_first.enable_caching, of_first.hash_block_size
            )
        manager.block_pool = pools[rank]
        manager._null_block = pools[rank].null_block
    of_vllm: Any = type(coordinator)
    coordinator.__class__ = _with_rank_pools(of_vllm)


@functools.cache
def _with_rank_pools(base: Any) -> type[KVCacheCoordinator]:
    class RankPoolCoordinator(base):
        def get_num_blocks_to_allocate(
            self,
            request_id: str,
            num_tokens: int,
            new_computed_blocks: Any,
            num_encoder_tokens: int,
            *args: Any,
            **options: Any,
        ) -> int:
            """A number that is more than the first rank's free blocks by as much as any rank lacks.

            vLLM compares it with the number of free blocks of the first rank's pool.
            """
            missing = {
                manager.block_pool: -manager.block_pool.get_num_free_blocks()
                for manager in self.single_type_managers
            }
            for manager, blocks in zip(self.single_type_managers, new_computed_blocks, strict=True):
                missing[manager.block_pool] += manager.get_num_blocks_to_allocate(
                    request_id, num_tokens, blocks, *args, **options
                )
            free: int = self.block_pool.get_num_free_blocks()
            return free + max(missing.values())

    assert issubclass(RankPoolCoordinator, KVCacheCoordinator)
    return RankPoolCoordinator
