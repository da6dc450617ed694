# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Allocates and shares the KV blocks of one group of a stage's layers.

A block of the pool holds one or more *pages*, and a page the keys and values of `page_size` retained tokens;
see `vllm_vtw.capacity`. Requests share rows up to *borders*, where a number of whole pages of the request's
own tokens ends: a row may begin with blocks that are shared as a whole, and then one that is shared in part.
That last block is copied before it is written to.
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
"""The hash of a row up to a border, a block of the row, and the number of the row's tokens up to the block's
last one."""


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

    def shareable(self, stage: int, page_size: int) -> int:
        """The number of the request's first tokens that a stage's row may be shared up to.

        For some drafters, vLLM's hash of a block depends on the tokens that follow the block, too (0.33), so
        the last tokens of a request may have none yet.

        Args:
            stage: The stage.
            page_size: Tokens of a page, which are as many as vLLM's hashes count in blocks of.
        """
        return min(of_stage(self.retentions, stage).shareable, len(self) * page_size)

    def of_row(self, stage: int, border: int, page_size: int, is_last: bool) -> BlockHash:
        """The hash under which a block of a stage's row is shared up to a border.

        What the row holds of the tokens before a border depends on these tokens, so it is shared under vLLM's
        hash of them. For example, with pages of 16 tokens, if positions 32 to 95 are withdrawn, the row up to
        the border at 112 holds 48 tokens, which fill three pages. If positions 35 to 97 are withdrawn, it
        holds 49, and one of them is in a fourth page.

        If tokens of the request have left before the border, the row also depends on the layer at which they
        did, and on which of them did. Requests share it only with those whose tokens left in the same way.

        Args:
            stage: The stage.
            border: A multiple of `page_size`.
            page_size: Tokens of a page, which are as many as vLLM's hashes count in blocks of.
            is_last: Whether the block is the row's last one before the border. Tokens in front of a border
                may fill one block and begin the next.
        """
        mark = of_stage(self.retentions, stage).mark_before(border)
        block_hash = self[border // page_size - 1]
        return BlockHash(block_hash + mark + (b"" if is_last else b"+"))


class StageManager(SingleTypeKVCacheManager):
    """vLLM's manager, with the number of tokens replaced by the number of tokens that the stage retains.

    A request therefore holds `ceil(retained / block_size)` blocks, and a withdrawn token never gets a slot.

    Attributes:
        block_size: Tokens of a block of the pool, of all its pages together.
        page_size: Tokens of a page.
        pages: Pages of a block.
        retentions: By request id, the retention of every stage past the first. The scheduler sets it.
        shares_parts: Whether requests share parts of blocks. The scheduler sets it.
        num_cached_block: By request id, how many borders of it the row has been offered up to.
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
        # `allocate_new_blocks` replaces a block that is shared in part by a copy. It is offered, too.
        self._hold(new_computed_blocks[:whole_blocks])
        start = of_stage(self.retentions[request_id], self.stage).position(whole_blocks * self.block_size)
        self.num_cached_block[request_id] = min(start, num_local_computed_tokens) // self.page_size

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
        """Offers the row up to the borders of the request's first `num_tokens` tokens to other requests.

        Another request can share a whole block at once if it ends at a border: kernels write all keys of a
        step before they read any. To share a part of a block it needs a copy, and copies are made before a
        step computes anything. What may be shared in part is therefore offered by `offer_parts`, after this
        step has been scheduled. This includes a whole block that ends between borders, because a hit may be
        rounded down to the border before its end.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retention = of_stage(hashes.retentions, self.stage)
        start = self.num_cached_block.get(request.request_id, 0)
        stop = min(num_tokens, hashes.shareable(self.stage, self.page_size)) // self.page_size
        if start >= stop:
            return
        row = self.req_to_blocks[request.request_id]
        held = retention.count(start * self.page_size)
        for border in range((start + 1) * self.page_size, (stop + 1) * self.page_size, self.page_size):
            before, held = held, retention.count(border)
            if held == before:
                continue
            for block in range(before // self.block_size, -(-held // self.block_size)):
                end = (block + 1) * self.block_size
                block_hash = hashes.of_row(self.stage, border, self.page_size, is_last=held <= end)
                key = make_block_hash_with_group_id(block_hash, self.kv_cache_group_id)
                offer = key, row[block], min(held, end)
                if held == end:
                    self.block_pool._insert_block_hash(*offer)
                else:
                    self._offered_after_step[request.request_id].append(offer)
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
            request: A request whose row has been offered by `cache_blocks`.
            most: The number of tokens that other rows offer.
        """
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retention = of_stage(hashes.retentions, self.stage)
        most = min(most, hashes.shareable(self.stage, self.page_size))
        offered = self.num_cached_block.get(request.request_id, 0) * self.page_size

        def is_offered(border: int, is_last: bool) -> bool | None:
            is_whole = is_last and retention.count(border) % self.block_size == 0
            return (border <= offered and (self.shares_parts or is_whole)) or None

        return _longest_hit(retention, most, self.page_size, self.pages, is_offered)[1]

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
        most = min(max_length, block_hashes.shareable(stage, page_size))

        def cached(border: int, is_last: bool) -> list[KVCacheBlock] | None:
            block_hash = block_hashes.of_row(stage, border, page_size, is_last)
            return block_pool.get_cached_block(block_hash, kv_cache_group_ids)

        found, hit = _longest_hit(retention, most, page_size, kv_cache_spec.pages, cached)
        rows = tuple(list(row) for row in zip(*found, strict=True)) or tuple([] for _ in kv_cache_group_ids)
        return rows, hit


def _longest_hit(
    retention: Retention,
    most: int,
    page_size: int,
    pages: int,
    lookup: Callable[[int, bool], Found | None],
) -> tuple[list[Found], int]:
    """Finds the longest part of a request that a row has cached, block by block.

    Each whole block is looked up at the first border behind its last token. If that is not cached, or is too
    far, the block is looked up at the borders before, from the last one on: it may be cached in part.

    Withdrawn tokens behind the last token that is cached are part of the hit. For example, with pages of 16
    tokens, if the prompt begins with 32 text tokens and the next 64 tokens are withdrawn, two pages cover 96
    tokens.

    Args:
        retention: What the row holds of the request.
        most: The largest number of tokens that the hit may have.
        page_size: Tokens of a page.
        pages: Pages of a block.
        lookup: Returns what is cached of a block up to a border, None if nothing is. It is also told whether
            the block is the row's last one before the border.

    Returns:
        What was found, for each block, and the number of tokens of the request that this covers.
    """
    found: list[Found] = []
    block_size, most = page_size * pages, most // page_size * page_size

    def border_behind(rank: int) -> int:
        """The first border behind a token of the row."""
        return (retention.position(rank) // page_size + 1) * page_size

    while True:
        covered = len(found) * block_size
        border = border_behind(covered + block_size - 1)
        hit = lookup(border, retention.count(border) == covered + block_size) if border <= most else None
        if hit is None:
            break
        found.append(hit)
    held = retention.count(min(most, border - page_size))
    while held > covered:
        border = border_behind(held - 1)
        hit = lookup(border, True)
        if hit is not None:
            found.append(hit)
            covered = held
            break
        held = retention.count(border - page_size)
    num_tokens = min(most, retention.position(covered)) // page_size * page_size
    return found[: -(-retention.count(num_tokens) // block_size)], num_tokens
