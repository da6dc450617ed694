# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Allocates and shares the KV blocks of one group of a stage's layers.

A block of the pool holds one or more *pages*, and a page the keys and values of `page_size` retained tokens;
see `vllm_vtw.capacity`. Requests share pages: a row may begin with blocks that are shared as a whole, and
then one that is shared up to the end of one of its pages. That last block is copied before it is written to.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_vtw.retention import Retention, of_stage

Found = TypeVar("Found")
Offer = tuple[BlockHashWithGroupId, KVCacheBlock, int]
"""The hash of a row up to the end of a page, the block that holds the page, and the number of tokens of the
row up to there."""


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

    def of_page(self, stage: int, page: int, page_size: int) -> BlockHash | None:
        """The hash under which a stage's row is shared up to the end of a page.

        What a page holds depends on all tokens of the request up to the page's last token, so it is shared
        under the hash of those tokens. vLLM has such a hash only where a number of whole blocks of the
        request ends. For example, with pages of 16 tokens, if positions 32 to 95 are withdrawn, page 2 of the
        row holds positions 96 to 111 and has the request's hash 6. If positions 35 to 97 are withdrawn, page
        2 of the row holds positions 32 to 34 and 98 to 110, and cannot be shared.

        If tokens of the request have left before the page ends, its content also depends on the layer at
        which they did. Requests share such a page only with those whose tokens left at the same layer.

        Args:
            stage: The stage.
            page: Index of the page in the row.
            page_size: Tokens of a page, which are as many as vLLM's hashes count in blocks of.

        Returns:
            The hash, or None if the row cannot be shared up to there.
        """
        retention = of_stage(self.retentions, stage)
        last = retention.position((page + 1) * page_size - 1)
        blocks, rest = divmod(last + 1, page_size)
        if rest:
            return None
        layer = retention.left_before(last)
        return self[blocks - 1] if layer is None else BlockHash(self[blocks - 1] + layer.to_bytes(2))


class StageManager(SingleTypeKVCacheManager):
    """vLLM's manager, with the number of tokens replaced by the number of tokens that the stage retains.

    A request therefore holds `ceil(retained / block_size)` blocks, and a withdrawn token never gets a slot.

    Attributes:
        block_size: Tokens of a block of the pool, of all its pages together.
        page_size: Tokens of a page.
        pages: Pages of a block.
        retentions: By request id, the retention of every stage past the first. The scheduler sets it.
        shares_parts: Whether requests share parts of blocks. The scheduler sets it.
        num_cached_block: By request id, how many pages of its row have been offered to other requests.
    """

    retentions: Mapping[str, tuple[Retention, ...]] = {}
    shares_parts: bool = True

    def __init__(self, kv_cache_spec: Any, *args: Any, **options: Any) -> None:
        super().__init__(kv_cache_spec, *args, **options)
        self.stage, self.pages = kv_cache_spec.stage, kv_cache_spec.pages
        self.page_size, self.block_size = kv_cache_spec.block_size, kv_cache_spec.tokens_per_block
        self._owners: Counter[int] = Counter()
        """By block id, the number of requests that hold it."""
        self._offered_after_step: defaultdict[str, list[Offer]] = defaultdict(list)
        """By request id, the parts of blocks that this step computes."""

    @property
    def num_held_blocks(self) -> int:
        """Blocks that requests hold. A block that several requests share counts once."""
        return len(self._owners)

    def _retained(self, request_id: str, num_tokens: int) -> int:
        return of_stage(self.retentions[request_id], self.stage).count(num_tokens)

    def _hold(self, blocks: Iterable[KVCacheBlock]) -> None:
        self._owners.update(block.block_id for block in blocks)

    def _release(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self._owners[block.block_id] -= 1
            if not self._owners[block.block_id]:
                del self._owners[block.block_id]

    def free_tail(self, request_id: str, num_tokens: int) -> None:
        """Frees the blocks that a request's first `num_tokens` tokens no longer need after its exit."""
        row = self.req_to_blocks[request_id]
        needed = -(-self._retained(request_id, num_tokens) // self.block_size)
        self._release(row[needed:])
        self.block_pool.free_blocks(reversed(row[needed:]))
        del row[needed:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        self._release(blocks)
        self._offered_after_step.pop(request_id, None)
        return blocks

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
        retained = self._retained(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, retained, num_external_computed_tokens
        )
        whole_blocks = retained // self.block_size
        # `allocate_new_blocks` replaces a block that is shared in part by a copy. Its pages are offered, too.
        self._hold(new_computed_blocks[:whole_blocks])
        self.num_cached_block[request_id] = whole_blocks * self.pages

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        **options: Any,
    ) -> None:
        num_local = self._retained(request_id, num_local_computed_tokens)
        num_computed = self._retained(request_id, num_local_computed_tokens + num_external_computed_tokens)
        held = len(self.req_to_blocks[request_id])
        super().allocate_external_computed_blocks(request_id, num_local, num_computed - num_local, **options)
        self._hold(self.req_to_blocks[request_id][held:])

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id,
            self._retained(request_id, num_tokens),
            self._retained(request_id, num_tokens_main_model),
        )
        self._hold(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **options: Any) -> None:
        """Offers the full pages of the request's first `num_tokens` tokens to other requests.

        Another request can share a whole block at once: kernels write all keys of a step before they read
        any. To share a part of a block it needs a copy, and copies are made before a step computes
        anything. Such a part is therefore offered by `offer_parts`, after this step has been scheduled.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retention = of_stage(hashes.retentions, self.stage)
        start = self.num_cached_block.get(request.request_id, 0)
        stop = retention.count(min(num_tokens, retention.shareable)) // self.page_size
        if start >= stop:
            return
        row = self.req_to_blocks[request.request_id]
        for page in range(start, stop):
            block_hash = hashes.of_page(self.stage, page, self.page_size)
            if block_hash is None:
                continue
            key = make_block_hash_with_group_id(block_hash, self.kv_cache_group_id)
            offer = key, row[page // self.pages], (page + 1) * self.page_size
            if (page + 1) % self.pages:
                self._offered_after_step[request.request_id].append(offer)
            else:
                self.block_pool._insert_block_hash(*offer)
        self.num_cached_block[request.request_id] = stop

    def offer_parts(self) -> None:
        """Offers the parts of blocks that the step computes, now that no other request can join the step.

        Beside a KV connector, it offers none, as the connector could overwrite a block before it is copied.
        """
        for offers in self._offered_after_step.values() if self.shares_parts else ():
            for offer in offers:
                self.block_pool._insert_block_hash(*offer)
        self._offered_after_step.clear()

    def cached_tokens(self, request: Request, most: int) -> int:
        """How many tokens of the prompt another request with the same tokens would find cached in this row.

        Args:
            request: A request whose full pages have been offered by `cache_blocks`.
            most: The number of tokens that other rows offer.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retention = of_stage(hashes.retentions, self.stage)
        most = min(most, retention.shareable)
        offered = self.num_cached_block.get(request.request_id, 0)
        if not self.shares_parts:
            offered -= offered % self.pages
        _, covered = _longest_hit(
            min(retention.count(most) // self.page_size, offered),
            self.pages,
            lambda page: hashes.of_page(self.stage, page, self.page_size),
        )
        return _hit_length(retention, covered, most, self.page_size)

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
        """The cached blocks that a request's rows begin with, and how many of its tokens they cover.

        If the last block of a row is shared in part only, the number of tokens says so.
        """
        stage, page_size = kv_cache_spec.stage, kv_cache_spec.block_size
        retention = of_stage(block_hashes.retentions, stage)
        most = min(max_length, retention.shareable)

        def cached(page: int) -> list[KVCacheBlock] | None:
            block_hash = block_hashes.of_page(stage, page, page_size)
            return block_pool.get_cached_block(block_hash, kv_cache_group_ids) if block_hash else None

        found, covered = _longest_hit(retention.count(most) // page_size, kv_cache_spec.pages, cached)
        rows = tuple(list(row) for row in zip(*found, strict=True)) or tuple([] for _ in kv_cache_group_ids)
        return rows, _hit_length(retention, covered, most, page_size)


def _longest_hit(
    num_pages: int, pages: int, lookup: Callable[[int], Found | None]
) -> tuple[list[Found], int]:
    """Finds the longest part of a row that is cached, block by block.

    For example, with 4 pages in a block, a row of 7 pages is looked up at the end of page 3 first, then at
    the end of page 6. If nothing is cached there, it is looked up at the ends of pages 5 and 4.

    Args:
        num_pages: Full pages of the row.
        pages: Pages of a block.
        lookup: Returns what is cached for the row up to the end of a page. None if nothing is.

    Returns:
        What was found, for each block, and the number of pages that this covers.
    """
    found: list[Found] = []
    covered = 0
    while covered < num_pages and covered % pages == 0:
        ends = range(min(covered + pages, num_pages) - 1, covered - 1, -1)
        at, block = next(((page, hit) for page in ends if (hit := lookup(page))), (None, None))
        if at is None or block is None:
            break
        found.append(block)
        covered = at + 1
    return found, covered


def _hit_length(retention: Retention, pages: int, most: int, page_size: int) -> int:
    """How many tokens of the prompt the first `pages` pages of a row cover, at most `most`.

    Withdrawn tokens after the last page are part of the hit. For example, with pages of 16 tokens, if the
    prompt begins with 32 text tokens and the next 64 tokens are withdrawn, two pages cover 96 tokens.
    """
    return min(most, retention.position(pages * page_size)) // page_size * page_size
