# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Allocates and shares the KV blocks of a stage past the first, one for `block_size` retained tokens."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_vtw.retention import Retention


class StagedBlockHashes(list[BlockHash]):
    """The block hashes of a request, together with its retentions.

    Lookups in the prefix cache get the block hashes and nothing else of a request.

    Args:
        hashes: vLLM's hashes. Hash i covers the request's tokens from the first to that at position
            `(i + 1) * block_size - 1`.
        retentions: The request's retention in every stage past the first.
    """

    def __init__(self, hashes: Sequence[BlockHash], retentions: tuple[Retention, ...]) -> None:
        super().__init__(hashes)
        self.retentions = retentions

    def row(self, stage: int, block_size: int, start: int, stop: int) -> Iterator[BlockHash | None]:
        """The hashes under which blocks of a stage's row are shared.

        The content of a block depends on all tokens of the request up to the block's last token, so it is
        shared under the hash of those tokens. vLLM has such a hash only where a number of whole blocks of the
        request ends. For example, with blocks of 16, if positions 32 to 95 are withdrawn, block 2 of the row
        holds positions 96 to 111 and has the request's hash 6. If positions 35 to 97 are withdrawn, block 2
        of the row holds positions 32 to 34 and 98 to 110, and cannot be shared.

        Args:
            stage: 1 or deeper.
            block_size: Tokens of a block.
            start: Index of the first block in the row.
            stop: Index of the block after the last one.

        Yields:
            For each block its hash, or None if it cannot be shared.
        """
        retention = self.retentions[stage - 1]
        for block in range(start, stop):
            blocks, rest = divmod(retention.position((block + 1) * block_size - 1) + 1, block_size)
            yield self[blocks - 1] if rest == 0 else None


class StageManager(SingleTypeKVCacheManager):
    """vLLM's manager, with the number of tokens replaced by the number of tokens that the stage retains.

    A request therefore holds `ceil(retained / block_size)` blocks, and a withdrawn token never gets a slot.

    Attributes:
        retentions: By request id, the retention of every stage past the first. The scheduler sets it.
        num_held_blocks: Blocks that requests hold. A block that several requests share counts once.
    """

    retentions: Mapping[str, tuple[Retention, ...]] = {}
    num_held_blocks = 0

    def _retained(self, request_id: str, num_tokens: int) -> int:
        return self.retentions[request_id][self.kv_cache_spec.stage - 1].count(num_tokens)

    def free_tail(self, request_id: str, num_tokens: int) -> None:
        """Frees the blocks that a request's first `num_tokens` tokens no longer need after its exit."""
        row = self.req_to_blocks[request_id]
        needed = -(-self._retained(request_id, num_tokens) // self.block_size)
        self._count_freed(row[needed:])
        self.block_pool.free_blocks(reversed(row[needed:]))
        del row[needed:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        self._count_freed(blocks)
        return blocks

    def _count_freed(self, blocks: Sequence[KVCacheBlock]) -> None:
        self.num_held_blocks -= sum(block.ref_cnt == 1 for block in blocks)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **options: Any,
    ) -> int:
        return super().get_num_blocks_to_allocate(
            request_id,
            self._retained(request_id, num_tokens),
            new_computed_blocks,
            self._retained(request_id, total_computed_tokens),
            self._retained(request_id, num_local_computed_tokens),
            self._retained(request_id, num_tokens_main_model),
            **options,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        assert num_external_computed_tokens == 0, "KV connectors are refused at start-up"
        self.num_held_blocks += sum(block.ref_cnt == 0 for block in new_computed_blocks)
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self._retained(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id,
            self._retained(request_id, num_tokens),
            self._retained(request_id, num_tokens_main_model),
        )
        self.num_held_blocks += len(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **options: Any) -> None:
        """Offers the full blocks of the request's first `num_tokens` tokens to other requests."""
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        stage = self.kv_cache_spec.stage
        retention = hashes.retentions[stage - 1]
        start = self.num_cached_block.get(request.request_id, 0)
        stop = retention.count(min(num_tokens, retention.shareable)) // self.block_size
        if start >= stop:
            return
        row = [*[None] * start, *hashes.row(stage, self.block_size, start, stop)]
        self.block_pool.cache_full_blocks(
            SimpleNamespace(block_hashes=row),  # it reads nothing else of a request, as KV events are off
            self.req_to_blocks[request.request_id],
            start,
            stop,
            self.block_size,
            self.kv_cache_group_id,
            block_mask=[block_hash is not None for block_hash in row[start:]],
        )
        self.num_cached_block[request.request_id] = stop

    def cached_tokens(self, request: Request, most: int) -> int:
        """How many tokens of the prompt another request with the same tokens would find cached in this row.

        Args:
            request: A request whose full blocks have been offered by `cache_blocks`.
            most: The number of tokens that other rows offer.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retention = hashes.retentions[self.kv_cache_spec.stage - 1]
        most = min(most, retention.shareable)
        filled = min(
            retention.count(most) // self.block_size, self.num_cached_block.get(request.request_id, 0)
        )
        row = hashes.row(self.kv_cache_spec.stage, self.block_size, 0, filled)
        blocks = sum(1 for _ in takewhile(lambda block_hash: block_hash is not None, row))
        return _hit_length(retention, blocks, most, self.block_size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: StagedBlockHashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        *args: Any,
        **options: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The cached blocks that a request's rows begin with, and how many of its tokens they cover."""
        stage, block_size = kv_cache_spec.stage, kv_cache_spec.block_size
        retention = block_hashes.retentions[stage - 1]
        most = min(max_length, retention.shareable)
        rows: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        for block_hash in block_hashes.row(stage, block_size, 0, retention.count(most) // block_size):
            blocks = block_hash and block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not blocks:
                break
            for row, block in zip(rows, blocks, strict=True):
                row.append(block)
        return rows, _hit_length(retention, len(rows[0]), most, block_size)


def _hit_length(retention: Retention, blocks: int, most: int, block_size: int) -> int:
    """How many tokens of the prompt the first `blocks` blocks of a row cover, at most `most`.

    Withdrawn tokens after the last block are part of the hit. For example, with blocks of 16, if the prompt
    begins with 32 text tokens and the next 64 tokens are withdrawn, two blocks cover 96 tokens.
    """
    return min(most, retention.position(blocks * block_size)) // block_size * block_size
