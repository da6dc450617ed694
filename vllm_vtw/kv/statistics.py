"""What the scheduler counts for `/metrics`."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.retention import Retention

# What is counted, and what tells its numbers apart: the layer of a request, the stage of tokens and blocks.
REQUESTS, WITHDRAWN_TOKENS, KV_BLOCKS, KV_BLOCKS_SAVED = "requests", "withdrawn_tokens", "kv_blocks", "saved"
Counts = dict[str, int]
"""By `name/label`. vLLM carries statistics of this type from a scheduler to the process that serves them."""


class Statistics:
    """Counts from one report to the next.

    Args:
        layers: The first layer of every stage past the first, and the number of layers.
        kv_cache_config: The groups of layers.
        managers: Of those groups.
    """

    def __init__(
        self,
        layers: Sequence[int],
        kv_cache_config: KVCacheConfig,
        managers: Sequence[SingleTypeKVCacheManager],
    ) -> None:
        self.layers = layers
        self.managers = managers
        sizes = [len(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self.num_layers, self.width = sum(sizes), max(sizes)
        self.since: Counter[str] = Counter()

    def count_request(self, retentions: Sequence[Retention]) -> None:
        """Counts a request that has arrived."""
        withdrawn = [retention.num_withdrawn for retention in retentions]
        leaves_at = next(
            (layer for layer, n in zip(self.layers, withdrawn, strict=False) if n), self.layers[-1]
        )
        self.since[f"{REQUESTS}/{leaves_at}"] += 1
        for stage, tokens in enumerate(withdrawn, 1):
            self.since[f"{WITHDRAWN_TOKENS}/{stage}"] += tokens

    def take(self) -> Counts:
        """What came since the last call, and the blocks that are held now."""
        counts, self.since = dict(self.since), Counter()
        held: defaultdict[int, int] = defaultdict(int)
        num_groups: Counter[int] = Counter()
        for manager in self.managers:
            spec = manager.kv_cache_spec
            stage = spec.stage if isinstance(spec, StageSpec) else 0
            held[stage] += sum(map(len, manager.req_to_blocks.values()))
            num_groups[stage] += 1
        for stage, blocks in held.items():
            counts[f"{KV_BLOCKS}/{stage}"] = blocks
        # Stage 0 has a block where stock vLLM has one, which holds all layers.
        in_stock = held[0] // num_groups[0] * self.num_layers // self.width
        counts[f"{KV_BLOCKS_SAVED}/"] = in_stock - sum(held.values())
        return counts
