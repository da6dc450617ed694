# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What the scheduler counts for `/metrics`; `vllm_vtw.metrics` shows it."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from vllm.v1.request import Request

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.metrics import (
    DIFFERENCE_BUCKETS,
    EXIT_LAYER,
    GUARD_CHANGED_TOKENS,
    GUARD_DIFFERENCE,
    GUARD_DIFFERENCE_SUM,
    GUARD_GREEDY_TOKENS,
    GUARD_LEFT_OUT,
    GUARD_REQUESTS,
    GUARD_TOKENS,
    KV_BLOCKS,
    KV_BLOCKS_SAVED,
    REQUESTS,
    WITHDRAWN_TOKENS,
)
from vllm_vtw.retention import Retention

LARGEST_DIFFERENCE = 1000.0
"""Differences of log-probabilities, in nats, count as this if they are larger."""


class Statistics:
    """Counts requests and withdrawn tokens between two reports.

    Args:
        layers: The first layer of every stage past the first, followed by the number of layers.
        groups: The KV-cache groups.
        manager: The manager of the KV blocks.
    """

    def __init__(self, layers: Sequence[int], groups: LayerGroups, manager: StagedKVCacheManager) -> None:
        self.layers = layers
        self.groups = groups
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
        first = self.exit_layer(retentions)
        self.counts[f"{REQUESTS}/{first}/{task}"] += 1
        for stage, retention in enumerate(retentions, 1):
            self.counts[f"{WITHDRAWN_TOKENS}/{stage}"] += retention.num_withdrawn
        return first

    def exit_layer(self, retentions: Sequence[Retention]) -> int:
        """The layer at which a request's first visual tokens leave, or the number of layers if none do.

        Args:
            retentions: Its retention in every stage past the first.
        """
        withdrawn = [retention.num_withdrawn for retention in retentions]
        return next(layer for layer, tokens in zip(self.layers, [*withdrawn, 1], strict=True) if tokens)

    def count_exit(self, retentions: Sequence[Retention]) -> int:
        """Counts a request that gates have decided about.

        Returns:
            The layer at which its visual tokens leave, or the number of layers if they stay.
        """
        layer = self.count_request(retentions)
        self.counts[f"{EXIT_LAYER}/{layer}"] += 1
        return layer

    def count_reading(
        self,
        layer: int,
        task: str,
        num_tokens: int,
        num_greedy: int,
        num_changed: int,
        differences: npt.NDArray[np.floating],
    ) -> None:
        """Counts an answer that the guard has read.

        Args:
            layer: The layer at which the request's first visual tokens left.
            task: The task that it chose, or "".
            num_tokens: Tokens of the answer.
            num_greedy: How many of them were chosen as the most probable ones.
            num_changed: How many of the latter the full model would not have chosen.
            differences: Absolute differences of the tokens' log-probabilities, in nats, shape `(tokens,)`, or
                `(0,)` if they are not known.
        """
        of = f"{layer}/{task}"
        self.counts[f"{GUARD_REQUESTS}/{of}"] += 1
        self.counts[f"{GUARD_TOKENS}/{of}"] += num_tokens
        self.counts[f"{GUARD_GREEDY_TOKENS}/{of}"] += num_greedy
        self.counts[f"{GUARD_CHANGED_TOKENS}/{of}"] += num_changed
        # A model may overflow. What is not a number has no difference, and an infinite one is cut off.
        differences = np.minimum(differences[~np.isnan(differences)], LARGEST_DIFFERENCE)
        buckets = np.searchsorted(DIFFERENCE_BUCKETS, differences)
        for bucket in np.unique(buckets):
            within = differences[buckets == bucket]
            self.counts[f"{GUARD_DIFFERENCE}/{bucket}/{of}"] += len(within)
            self.counts[f"{GUARD_DIFFERENCE_SUM}/{bucket}/{of}"] += int(within.sum(dtype=np.float64) * 1e9)

    def count_left_out(self, reason: str) -> None:
        """Counts an answer that the guard chose and did not read."""
        self.counts[f"{GUARD_LEFT_OUT}/{reason}"] += 1

    def take(self, running: Iterable[Request] = ()) -> dict[str, int]:
        """The counts since the last call, and the blocks that are held now.

        Args:
            running: The requests that are running.

        Returns:
            By `name/label`. The label is `layer/task` where requests are counted, and a stage where tokens or
            blocks are. What the guard counts has `layer/task`, or `bucket/layer/task` in its histogram.
        """
        counts, self.counts = dict(self.counts), Counter()
        held = self.manager.held_blocks()
        # A block of stock vLLM's only group holds one page of all layers.
        in_stock = self.manager.pages_in_stock(running) * self.groups.num_layers // self.groups.width
        counts |= {f"{KV_BLOCKS}/{stage}": blocks for stage, blocks in sorted(held.items())}
        return counts | {f"{KV_BLOCKS_SAVED}/": in_stock - held.total()}
