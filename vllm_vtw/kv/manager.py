"""Allocates and shares the KV blocks of a stage past the first: one per `block_size` retained tokens."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_vtw.retention import Retention


class RequestHashes(list[BlockHash]):
    """The hashes of a request's blocks, of all its tokens, and what its stages past the first retain.

    The hashes are all that vLLM shows to a lookup in the prefix cache.
    """

    def __init__(self, hashes: Sequence[BlockHash], retentions: tuple[Retention, ...]) -> None:
        super().__init__(hashes)
        self.retentions = retentions

    def row(self, stage: int, block_size: int, start: int, stop: int) -> Iterator[BlockHash | None]:
        """For blocks `start` to `stop - 1` of a stage's row the hash under which they are shared.

        A row's block is what all tokens up to its last one made it. Its hash is therefore theirs, where they
        fill blocks; elsewhere they have none, and the block cannot be shared.
        """
        retention = self.retentions[stage - 1]
        for block in range(start, stop):
            blocks, rest = divmod(retention.position((block + 1) * block_size - 1) + 1, block_size)
            yield self[blocks - 1] if rest == 0 else None


class StageManager(SingleTypeKVCacheManager):
    """vLLM's manager with every token count mapped to the count that the stage retains.

    A request's blocks therefore number `ceil(retained / block_size)`, and a withdrawn token never had one.
    """

    retentions: Mapping[str, tuple[Retention, ...]] = {}
    """By request: the retention of every stage past the first. Set by the scheduler, which sees requests."""
    num_held_blocks = 0
    """Blocks that requests hold, each counted once however many requests share it."""

    def _retained(self, request_id: str, num_tokens: int) -> int:
        return self.retentions[request_id][self.kv_cache_spec.stage - 1].count(num_tokens)

    def give_back(self, request_id: str, num_tokens: int) -> None:
        """Frees what a request's first `num_tokens` tokens do not fill, once its retention is another."""
        row = self.req_to_blocks[request_id]
        left = -(-self._retained(request_id, num_tokens) // self.block_size)
        self._let_go(row[left:])
        self.block_pool.free_blocks(reversed(row[left:]))
        del row[left:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        self._let_go(blocks)
        return blocks

    def _let_go(self, blocks: Sequence[KVCacheBlock]) -> None:
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
        """Shares what the request's first `num_tokens` tokens filled of its row."""
        hashes = request.block_hashes
        assert isinstance(hashes, RequestHashes)
        stage = self.kv_cache_spec.stage
        retention = hashes.retentions[stage - 1]
        start = self.num_cached_block.get(request.request_id, 0)
        stop = retention.count(min(num_tokens, retention.shareable)) // self.block_size
        if start >= stop:
            return
        row = [*[None] * start, *hashes.row(stage, self.block_size, start, stop)]
        self.block_pool.cache_full_blocks(
            SimpleNamespace(block_hashes=row),  # all that it reads while there are no KV events
            self.req_to_blocks[request.request_id],
            start,
            stop,
            self.block_size,
            self.kv_cache_group_id,
            block_mask=[block_hash is not None for block_hash in row[start:]],
        )
        self.num_cached_block[request.request_id] = stop

    def shared_tokens(self, request: Request, most: int) -> int:
        """How many of its tokens a request would find in this row, had another one with the same computed it.

        Args:
            request: Whose blocks have been shared as far as it has been computed.
            most: How many other rows offer.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, RequestHashes)
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
        block_hashes: RequestHashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        *args: Any,
        **options: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The shared blocks that a request's rows begin with, and how many of its tokens they stand for."""
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
    """How many tokens the first `blocks` blocks of a row stand for, `most` at most.

    Withdrawn tokens behind the last block are part of the hit. With blocks of 16, of a row whose first 32
    tokens are text and whose next 64 are withdrawn, two blocks stand for 96 tokens.
    """
    return min(most, retention.position(blocks * block_size)) // block_size * block_size
