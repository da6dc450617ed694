# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plugin's Prometheus metrics, which vLLM shows on `/metrics`.

vLLM imports this module in a server of any model, so it must not import anything that changes vLLM.
"""

from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_vtw.config import SCHEDULER

REQUESTS, WITHDRAWN_TOKENS, KV_BLOCKS, KV_BLOCKS_SAVED = "requests", "withdrawn_tokens", "kv_blocks", "saved"
EXIT_LAYER = "exit_layer"
"""The names under which the scheduler sends its statistics; see `Statistics.take`."""
LABELS = ["model_name", "engine"]


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
        self.model_name = vllm_config.model_config.served_model_name
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.exit_layers: Histogram | None = None

    def log_engine_initialized(self) -> None:
        """Creates the metrics.

        It is too early in `__init__`: vLLM's own Prometheus logger, which is created later, removes all
        metrics named `vllm:` from the registry.
        """
        if not self.withdraws:
            return
        from vllm_vtw.startup import vtw_config

        policy = vtw_config(self.vllm_config).policy
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

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Adds a scheduler's statistics to the metrics. vLLM calls it for each report.

        They come in the field `waiting_lora_adapters`, for the reason that `VTWScheduler.make_stats` gives.
        """
        if not self.counters or scheduler_stats is None:
            return
        for key, value in scheduler_stats.waiting_lora_adapters.items():
            name, _, label = key.partition("/")
            if name == EXIT_LAYER:
                assert self.exit_layers is not None
                for _ in range(value):
                    self.exit_layers.labels(self.model_name, str(engine_idx)).observe(int(label))
                continue
            own = label.split("/", 1) if label else []
            labels = [self.model_name, str(engine_idx), *own]
            if name in self.counters:
                self.counters[name].labels(*labels).inc(value)
            else:
                self.gauges[name].labels(*labels).set(value)
