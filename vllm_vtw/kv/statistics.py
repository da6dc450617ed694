"""What the scheduler counts for `/metrics`."""

from collections import Counter
from collections.abc import Sequence

from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.metrics import EXIT_LAYER, KV_BLOCKS, KV_BLOCKS_SAVED, REQUESTS, WITHDRAWN_TOKENS
from vllm_vtw.retention import Retention


class Statistics:
    """Counts from one report to the next.

    Args:
        layers: The first layer of every stage past the first, and the number of layers.
        kv_cache_config: The groups of layers.
        manager: Of those groups.
    """

    def __init__(
        self,
        layers: Sequence[int],
        kv_cache_config: KVCacheConfig,
        manager: StagedKVCacheManager,
    ) -> None:
        self.layers = layers
        self.manager = manager
        groups = kv_cache_config.kv_cache_groups
        sizes = [len(group.layer_names) for group in groups]
        self.num_layers, self.width = sum(sizes), max(sizes)
        self.whole_groups = sum(not isinstance(group.kv_cache_spec, StageSpec) for group in groups)
        """Groups of stage 0."""
        self.since: Counter[str] = Counter()

    def count_request(self, retentions: Sequence[Retention]) -> int:
        """Counts a request whose retention is known. Returns the layer at which its first visual tokens
        leave, the number of layers where none do."""
        withdrawn = [retention.num_withdrawn for retention in retentions]
        left = zip(self.layers, [*withdrawn, 1], strict=True)
        first = next(layer for layer, tokens in left if tokens)
        self.since[f"{REQUESTS}/{first}"] += 1
        for stage, tokens in enumerate(withdrawn, 1):
            self.since[f"{WITHDRAWN_TOKENS}/{stage}"] += tokens
        return first

    def count_exit(self, retentions: Sequence[Retention]) -> int:
        """Counts a request that gates have decided about. Returns the layer at which its visual tokens leave,
        the number of layers where they stay."""
        layer = self.count_request(retentions)
        self.since[f"{EXIT_LAYER}/{layer}"] += 1
        return layer

    def take(self) -> dict[str, int]:
        """What came since the last call, and the blocks that are held now, by `name/label`.

        The label is the layer of requests, the stage of tokens and blocks.
        """
        counts, self.since = dict(self.since), Counter()
        held = self.manager.held_blocks()
        # Stage 0 has a block where stock vLLM has one, which holds all layers.
        in_stock = held[0] // self.whole_groups * self.num_layers // self.width
        counts |= {f"{KV_BLOCKS}/{stage}": blocks for stage, blocks in sorted(held.items())}
        return counts | {f"{KV_BLOCKS_SAVED}/": in_stock - held.total()}
