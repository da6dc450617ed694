# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What the scheduler counts for `/metrics`; `vllm_vtw.metrics` shows it."""

from collections import Counter
from collections.abc import Sequence

from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.metrics import EXIT_LAYER, KV_BLOCKS, KV_BLOCKS_SAVED, REQUESTS, WITHDRAWN_TOKENS
from vllm_vtw.retention import Retention


class Statistics:
    """Counts requests and withdrawn tokens between two reports.

    Args:
        layers: The first layer of every stage past the first, followed by the number of layers.
        width: The number of layers that a KV block has memory for.
        manager: The manager of the KV blocks.
    """

    def __init__(self, layers: Sequence[int], width: int, manager: StagedKVCacheManager) -> None:
        self.layers = layers
        self.width = width
        self.manager = manager
        self.counts: Counter[str] = Counter()

    def count_request(self, retentions: Sequence[Retention], task: str = "") -> int:
        """Counts a request whose retention is known.

        Args:
            retentions: Its retention in every stage past the first.
            task: The name of the task that it chose, if it chose one.

        Returns:
            The layer at which its first visual tokens leave, or the number of layers if none do.
        """
        withdrawn = [retention.num_withdrawn for retention in retentions]
        left = zip(self.layers, [*withdrawn, 1], strict=True)
        first = next(layer for layer, tokens in left if tokens)
        self.counts[f"{REQUESTS}/{first}/{task}"] += 1
        for stage, tokens in enumerate(withdrawn, 1):
            self.counts[f"{WITHDRAWN_TOKENS}/{stage}"] += tokens
        return first

    def count_exit(self, retentions: Sequence[Retention]) -> int:
        """Counts a request that gates have decided about.

        Returns:
            The layer at which its visual tokens leave, or the number of layers if they stay.
        """
        layer = self.count_request(retentions)
        self.counts[f"{EXIT_LAYER}/{layer}"] += 1
        return layer

    def take(self) -> dict[str, int]:
        """The counts since the last call, and the blocks that are held now.

        Returns:
            By `name/label`. The label is a layer where requests are counted, followed by `/task`, and a stage
            where tokens or blocks are.
        """
        counts, self.counts = dict(self.counts), Counter()
        held = self.manager.held_blocks()
        # A block of stock vLLM's only group holds one page of all layers.
        in_stock = self.manager.pages_of_stage_0() * self.layers[-1] // self.width
        counts |= {f"{KV_BLOCKS}/{stage}": blocks for stage, blocks in sorted(held.items())}
        return counts | {f"{KV_BLOCKS_SAVED}/": in_stock - held.total()}
