# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The KV-cache spec of a stage's layers.

Importing this module registers the spec and its manager with vLLM. A process imports it at the latest when it
unpickles such a spec.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv import groups as split
from vllm_vtw.kv.stage_block_manager import StageManager


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the tokens that a stage retains, stored compactly.

    It does not subclass `FullAttentionSpec`: vLLM would merge it into the group of stage 0, and on a
    prefix-cache hit would trim its blocks as if they held all tokens.

    Attributes:
        block_size: The number of tokens of a page, which is what vLLM calls a block.
        stage: Number of the stage. Layers of stage 0 have this spec if their blocks hold several pages, or if
            there are several pipeline ranks.
        pages: The number of pages of each layer that a block holds.
        width: The number of layers that a block has memory for.
        rank: The pipeline rank that has the layers. Every rank has blocks of its own.
        rank_pages: For every pipeline rank, the pages of each of its groups.
    """

    stage: int
    pages: int = 1
    width: int
    rank: int = 0
    rank_pages: tuple[tuple[int, ...], ...]

    @classmethod
    def like(cls, spec: FullAttentionSpec, groups: LayerGroups, group: LayerGroup) -> "StageSpec":
        """Makes the spec of one of a model's groups, with the memory layout of a layer's own spec."""
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(
            spec,
            cls,
            drop=dropped,
            stage=group.stage,
            pages=group.pages,
            width=groups.width_of(group.rank),
            rank=group.rank,
            rank_pages=tuple(
                tuple(other.pages for other in groups.groups if other.rank == rank) for rank in groups.ranks
            ),
        )

    @staticmethod
    def layers_per_group(specs: Sequence[KVCacheSpec]) -> list[int]:
        """The number of layers in a KV-cache group, for each of a model's specs.

        Args:
            specs: The different specs of a model's layers.
        """
        widest = max(spec.width for spec in specs if isinstance(spec, StageSpec))
        return [spec.width // spec.pages if isinstance(spec, StageSpec) else widest for spec in specs]

    @property
    def tokens_per_block(self) -> int:
        """The number of tokens that a block holds."""
        return self.block_size * self.pages

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether layers with these specs could be one group. Stages could not: their tokens differ."""
        return all(spec == self for spec in kv_cache_specs.values())

    @property
    def uses_slot_mapping(self) -> bool:
        """False, because vLLM's slot mapping gives every token a slot. The plugin makes the stage's own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a layer needs for the largest request: one without images, which retains all tokens.

        vLLM divides them by the size of a page and adds up the blocks of all groups, as if they shared their
        blocks. With several pipeline ranks, each has blocks of its own. The groups of the first rank then
        stand for those of the rank where the request takes the most, and the others are not counted.
        """
        if self.rank > 0:
            return 0
        tokens = vllm_config.model_config.max_model_len
        of_rank = [
            sum(cdiv(tokens, self.block_size * pages) for pages in of_groups) for of_groups in self.rank_pages
        ]
        more_on_other_rank = cdiv(max(of_rank) - of_rank[0], len(self.rank_pages[0]))
        return (cdiv(tokens, self.tokens_per_block) + more_on_other_rank) * self.page_size_bytes


# vLLM adds its own specs to the registry only if it is empty, so they have to be added first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager)
split.install()
