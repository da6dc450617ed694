"""The KV-cache spec of a stage past the first, registered with its manager when this module is imported.

Whatever process handles such a spec has imported this module, by unpickling it if not otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_vtw import capacity
from vllm_vtw.kv import groups
from vllm_vtw.kv.manager import StageManager


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the tokens that a stage retains, stored compactly.

    Not a `FullAttentionSpec`: vLLM would merge it into the group of stage 0, and would trim its blocks on a
    prefix hit as if they held every token.
    """

    stage: int
    keep: float = 0.0
    """The fraction of visual tokens that the stage holds."""

    @classmethod
    def like(cls, spec: FullAttentionSpec, stage: int, keep: float = 0.0) -> "StageSpec":
        """The spec of `stage` with the layout of the model's own layers."""
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, cls, drop=dropped, stage=stage, keep=keep)

    @staticmethod
    def layers_per_group(specs: Sequence[KVCacheSpec], counts: Sequence[int]) -> int:
        """How vLLM is to split the layers of all stages into groups, `counts[i]` of them with `specs[i]`."""
        keeps = [spec.keep if isinstance(spec, StageSpec) else 1.0 for spec in specs]
        return capacity.layers_per_group(counts, keeps)

    @property
    def uses_slot_mapping(self) -> bool:
        """False: vLLM's would give every token a slot; the stage writes its own."""
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request that vLLM may be sent: text only, which retains everything."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


# The registry fills itself only while it is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(StageSpec, StageManager)
groups.install()
