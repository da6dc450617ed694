"""The KV-cache spec of a stage past the first. Importing this module registers it with its manager.

Every process that handles such a spec has imported this module, at the latest when it unpickled the spec.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_vtw import capacity
from vllm_vtw.kv import groups
from vllm_vtw.kv.block_manager import StageManager


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the tokens that a stage retains, stored compactly.

    It is not a `FullAttentionSpec`, which vLLM would merge into the group of stage 0, and whose blocks it
    would trim on a prefix-cache hit as if they held every token.

    Attributes:
        stage: 1 or deeper.
        keep: The fraction of visual tokens that the stage keeps.
    """

    stage: int
    keep: float = 0.0

    @classmethod
    def like(cls, spec: FullAttentionSpec, stage: int, keep: float = 0.0) -> "StageSpec":
        """A spec of `stage` with the memory layout of the model's own spec."""
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, cls, drop=dropped, stage=stage, keep=keep)

    @staticmethod
    def layers_per_group(specs: Sequence[KVCacheSpec], counts: Sequence[int]) -> int:
        """How many layers vLLM puts into every KV-cache group, if `counts[i]` layers have `specs[i]`."""
        keeps = [spec.keep if isinstance(spec, StageSpec) else 1.0 for spec in specs]
        return capacity.layers_per_group(counts, keeps)

    @property
    def uses_slot_mapping(self) -> bool:
        """False, as vLLM's slot mapping gives every token a slot. The stage writes its own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest possible request. It has no images, so every token is retained."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


# The registry adds vLLM's own specs only while it is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager)
groups.install()
