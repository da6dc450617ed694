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

from vllm_vtw import capacity
from vllm_vtw.kv import groups
from vllm_vtw.kv.stage_block_manager import StageManager


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the tokens that a stage retains, stored compactly.

    It does not subclass `FullAttentionSpec`: vLLM would merge it into the group of stage 0, and on a
    prefix-cache hit would trim its blocks as if they held all tokens.

    Attributes:
        stage: Number of the stage, 1 or higher.
        keep: The fraction of visual tokens that the stage holds at least, as in `Policy.keeps`.
    """

    stage: int
    keep: float = 0.0

    @classmethod
    def like(cls, spec: FullAttentionSpec, stage: int, keep: float = 0.0) -> "StageSpec":
        """Makes the spec of a stage, with the memory layout of a layer's own spec."""
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, cls, drop=dropped, stage=stage, keep=keep)

    @staticmethod
    def layers_per_group(specs: Sequence[KVCacheSpec], counts: Sequence[int]) -> int:
        """The number of layers in each KV-cache group; see `vllm_vtw.capacity.layers_per_group`.

        Args:
            specs: The different specs of a model's layers.
            counts: The number of layers with each of them.
        """
        keeps = [spec.keep if isinstance(spec, StageSpec) else 1.0 for spec in specs]
        return capacity.layers_per_group(counts, keeps)

    @property
    def uses_slot_mapping(self) -> bool:
        """False, because vLLM's slot mapping gives every token a slot. The plugin makes the stage's own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a layer needs for the largest request: one without images, which retains all tokens."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


# vLLM adds its own specs to the registry only if it is empty, so they have to be added first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager)
groups.install()
