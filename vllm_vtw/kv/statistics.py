"""What the scheduler counts for `/metrics`."""

import time
from collections import Counter
from collections.abc import Sequence

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.metrics import EXIT_LAYER, KV_BLOCKS, KV_BLOCKS_SAVED, REQUESTS, WITHDRAWN_TOKENS
from vllm_vtw.retention import Retention

LOOK_EVERY_SECONDS = 1.0


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
        self.look_again = 0.0

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
        now = time.monotonic()
        # Going through the blocks of all requests in every step would cost more than the step's plan.
        idle = not any(manager.req_to_blocks for manager in self.managers)
        if idle or now >= self.look_again:
            # What follows idleness is looked at at once.
            self.look_again = now if idle else now + LOOK_EVERY_SECONDS
            counts |= self._held()
        return counts

    def _held(self) -> dict[str, int]:
        held: Counter[int] = Counter()
        num_groups: Counter[int] = Counter()
        for manager in self.managers:
            spec = manager.kv_cache_spec
            stage = spec.stage if isinstance(spec, StageSpec) else 0
            held[stage] += len({block.block_id for row in manager.req_to_blocks.values() for block in row})
            num_groups[stage] += 1
        # Stage 0 has a block where stock vLLM has one, which holds all layers.
        in_stock = held[0] // num_groups[0] * self.num_layers // self.width
        counts = {f"{KV_BLOCKS}/{stage}": blocks for stage, blocks in held.items()}
        return counts | {f"{KV_BLOCKS_SAVED}/": in_stock - held.total()}
