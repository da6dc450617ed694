# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plugin's Prometheus metrics, which vLLM shows on `/metrics`.

vLLM imports this module in a server of any model, so it must not import anything that changes vLLM.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_vtw.config import SCHEDULER

REQUESTS, WITHDRAWN_TOKENS, KV_BLOCKS, KV_BLOCKS_SAVED = "requests", "withdrawn_tokens", "kv_blocks", "saved"
EXIT_LAYER = "exit_layer"
GUARD_REQUESTS, GUARD_TOKENS, GUARD_GREEDY_TOKENS = "guard_requests", "guard_tokens", "guard_greedy_tokens"
GUARD_CHANGED_TOKENS, GUARD_LEFT_OUT = "guard_changed_tokens", "guard_left_out"
GUARD_DIFFERENCE, GUARD_DIFFERENCE_SUM = "guard_difference", "guard_difference_sum"
"""The names under which the scheduler sends its statistics; see `Statistics.take`."""
OWN_KEY = "vllm:vtw_"
"""What the keys of these statistics begin with among the names of LoRA adapters."""
LABELS = ["model_name", "engine"]
DIFFERENCE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0)
"""The upper bounds of the buckets of `vllm:vtw_guard_logprob_difference`, in nats. The last one has none."""


class WithdrawalMetrics(AggregateStatLoggerBase):
    """Publishes what the scheduler counts. It does nothing in a server that runs without `--model-impl vtw`.

    vLLM makes one for all engines of a server.

    Args:
        vllm_config: vLLM's configuration.
        engine_indexes: The data-parallel ranks of the engines.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int]) -> None:
        self.withdraws = vllm_config.scheduler_config.scheduler_cls == SCHEDULER
        self.vllm_config = vllm_config
        self.engine_indexes = engine_indexes
        self.model_name = vllm_config.model_config.served_model_name
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.exit_layers: Histogram | None = None
        self.differences: Histogram | None = None

    def log_engine_initialized(self) -> None:
        """Creates the metrics.

        It is too early in `__init__`: vLLM's own Prometheus logger, which is created later, removes all
        metrics named `vllm:` from the registry.
        """
        if not self.withdraws:
            return
        from vllm_vtw.startup.options import vtw_config

        config = vtw_config(self.vllm_config)
        policy = config.policy
        if policy.gate is not None:
            num_layers = self.vllm_config.model_config.hf_text_config.num_hidden_layers
            self.exit_layers = Histogram(
                "vllm:vtw_exit_layer",
                "Layer from which on gates withdrew a request's visual tokens, or the number of layers if "
                "they did not.",
                LABELS,
                buckets=[*(stage.layer for stage in policy.stages), num_layers],
            )
        self.counters = {
            REQUESTS: Counter(
                "vllm:vtw_requests",
                "Number of requests by the layer from which on their visual tokens are withdrawn, which is "
                "the number of layers if none are, and by the task that they chose.",
                [*LABELS, "layer", "task"],
            ),
            WITHDRAWN_TOKENS: Counter(
                "vllm:vtw_withdrawn_tokens",
                "Number of visual tokens that a stage, a run of layers with the same tokens, does not hold.",
                [*LABELS, "stage"],
            ),
        }
        if config.guard_share:
            self._create_guard_metrics()
        self.gauges = {
            KV_BLOCKS: Gauge(
                "vllm:vtw_kv_blocks",
                "Number of KV blocks that running requests hold in a stage.",
                [*LABELS, "stage"],
                multiprocess_mode="mostrecent",
            ),
            KV_BLOCKS_SAVED: Gauge(
                "vllm:vtw_kv_blocks_saved",
                "Number of KV blocks that the running requests would hold in stock vLLM, less those that "
                "they hold.",
                LABELS,
                multiprocess_mode="mostrecent",
            ),
        }
        # Several API servers show only metrics that have a value. Probes look for this one.
        for index in self.engine_indexes:
            self.gauges[KV_BLOCKS_SAVED].labels(self.model_name, str(index)).set(0)

    def _create_guard_metrics(self) -> None:
        of_answers = [*LABELS, "layer", "task"]
        self.counters |= {
            GUARD_REQUESTS: Counter(
                "vllm:vtw_guard_requests",
                "Number of requests whose answers were read again with the full model, by the layer from "
                "which on their visual tokens were withdrawn, and by the task that they chose.",
                of_answers,
            ),
            GUARD_TOKENS: Counter(
                "vllm:vtw_guard_tokens", "Number of tokens of the answers that were read again.", of_answers
            ),
            GUARD_GREEDY_TOKENS: Counter(
                "vllm:vtw_guard_greedy_tokens",
                "Number of those tokens, of requests with temperature 0, that the model with withdrawal "
                "finds most probable.",
                of_answers,
            ),
            GUARD_CHANGED_TOKENS: Counter(
                "vllm:vtw_guard_changed_tokens",
                "Number of those most probable tokens that the full model does not find most probable.",
                of_answers,
            ),
            GUARD_LEFT_OUT: Counter(
                "vllm:vtw_guard_left_out",
                "Number of requests that were chosen and not read again, by reason.",
                [*LABELS, "reason"],
            ),
        }
        self.differences = Histogram(
            "vllm:vtw_guard_logprob_difference",
            "Absolute difference of the log-probabilities of a token of an answer with and without "
            "withdrawal, in nats.",
            of_answers,
            buckets=DIFFERENCE_BUCKETS,
        )

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Adds a scheduler's statistics to the metrics. vLLM calls it for each report.

        They come in the field `waiting_lora_adapters`, for the reason that `VTWScheduler.make_stats` gives,
        and are taken out of it. vLLM's own logger, which shows names of adapters, is called after this one.
        """
        if scheduler_stats is None:
            return
        adapters = scheduler_stats.waiting_lora_adapters
        own = [key for key in adapters if key.startswith(OWN_KEY)]
        counts = {key.removeprefix(OWN_KEY): adapters.pop(key) for key in own}
        if self.counters:
            self._add(counts, engine_idx)

    def _add(self, counts: Mapping[str, int], engine_idx: int) -> None:
        """Adds to the metrics what `Statistics.take` has returned."""
        for key, value in counts.items():
            name, _, label = key.partition("/")
            if name == GUARD_DIFFERENCE:
                self._observe_differences(engine_idx, label, value, counts[f"{GUARD_DIFFERENCE_SUM}/{label}"])
                continue
            if name == GUARD_DIFFERENCE_SUM:
                continue
            if name == EXIT_LAYER:
                assert self.exit_layers is not None
                for _ in range(value):
                    self.exit_layers.labels(self.model_name, str(engine_idx)).observe(int(label))
                continue
            labels = [self.model_name, str(engine_idx), *(label.split("/", 1) if label else [])]
            if name in self.counters:
                self.counters[name].labels(*labels).inc(value)
            else:
                self.gauges[name].labels(*labels).set(value)

    def _observe_differences(self, engine_idx: int, label: str, count: int, nanonats: int) -> None:
        """Adds the differences of one bucket to the histogram.

        They are added as if each of them were their mean, which keeps their sum. As the sum was rounded, the
        mean may lie outside of the bucket, and is moved into it.

        Args:
            engine_idx: As `record` takes it.
            label: `bucket/layer/task`.
            count: The number of differences in the bucket.
            nanonats: Their sum, in 1e-9 nats.
        """
        assert self.differences is not None
        bucket, layer, task = label.split("/", 2)
        lower, upper = (0.0, *DIFFERENCE_BUCKETS, math.inf)[int(bucket) : int(bucket) + 2]
        mean = min(max(nanonats / 1e9 / count, math.nextafter(lower, math.inf)), upper)
        histogram = self.differences.labels(self.model_name, str(engine_idx), layer, task)
        for _ in range(count):
            histogram.observe(mean)
