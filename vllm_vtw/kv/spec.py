# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The KV-cache spec of a stage past the first.

Importing this module registers the spec and its manager with vLLM. A process imports it at the latest when it
unpickles such a spec.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_vtw.kv import groups
from vllm_vtw.kv.stage_block_manager import StageManager


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the tokens that a stage retains, stored compactly.

    It does not subclass `FullAttentionSpec`: vLLM would merge it into the group of stage 0, and on a
    prefix-cache hit would trim its blocks as if they held all tokens.

    Attributes:
        block_size: The number of tokens of a page, which is what vLLM calls a block.
        stage: Number of the stage. Layers of stage 0 have this spec only if their blocks hold several pages.
        pages: The number of pages of each layer that a block holds.
        width: The number of layers that a block has memory for.
    """

    stage: int
    pages: int = 1
    width: int

    @classmethod
    def like(cls, spec: FullAttentionSpec, stage: int, pages: int, width: int) -> "StageSpec":
        """Makes the spec of a stage, with the memory layout of a layer's own spec."""
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, cls, drop=dropped, stage=stage, pages=pages, width=width)

    @staticmethod
    def layers_per_group(specs: Sequence[KVCacheSpec]) -> list[int]:
        """The number of layers in a KV-cache group, for each of a model's specs.

        Args:
            specs: The different specs of a model's layers.
        """
        (width,) = {spec.width for spec in specs if isinstance(spec, StageSpec)}
        return [width // spec.pages if isinstance(spec, StageSpec) else width for spec in specs]

    @property
    def tokens_per_block(self) -> int:
        """The number of tokens that a block holds."""
        return self.block_size * self.pages

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether layers with these specs could be one group. Stages cannot, as they hold different tokens."""
        return all(spec == self for spec in kv_cache_specs.values())

    @property
    def uses_slot_mapping(self) -> bool:
        """False, because vLLM's slot mapping gives every token a slot. The plugin makes the stage's own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a layer needs for the largest request: one without images, which retains all tokens.

        vLLM divides them by the size of a page to get the number of blocks.
        """
        return cdiv(vllm_config.model_config.max_model_len, self.tokens_per_block) * self.page_size_bytes


# vLLM adds its own specs to the registry only if it is empty, so they have to be added first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager)
groups.install()
