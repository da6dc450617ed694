"""Allocates the KV blocks of a stage past the first: one for every `block_size` retained tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_vtw.retention import Retention


class StageManager(SingleTypeKVCacheManager):
    """vLLM's manager with every token count mapped to the count that the stage retains.

    A request's blocks therefore number `ceil(retained / block_size)`, and a withdrawn token never had one.
    """

    retentions: Mapping[str, tuple[Retention, ...]] = {}
    """By request: the retention of every stage past the first. Set by the scheduler, which sees requests."""

    def _retained(self, request_id: str, num_tokens: int) -> int:
        return self.retentions[request_id][self.kv_cache_spec.stage - 1].count(num_tokens)

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
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self._retained(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(
            request_id,
            self._retained(request_id, num_tokens),
            self._retained(request_id, num_tokens_main_model),
        )

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **options: Any) -> None:
        """Leaves the blocks out of the prefix cache: `find_longest_cache_hit` would not take them."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *_: Any, **__: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """No hit: what these blocks hold depends on more than the hash of the tokens before them.

        The coordinator takes the shortest hit of all groups, so stage 0 offers none either.
        """
        return tuple([] for _ in kv_cache_group_ids), 0
