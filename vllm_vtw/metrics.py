"""Prometheus metrics of withdrawal, on vLLM's own `/metrics`.

A server of any model imports this module, so it imports nothing that hooks into vLLM.
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
LABELS = ["model_name", "engine"]


class WithdrawalMetrics(AggregateStatLoggerBase):
    """vLLM makes one for every engine of a server; it does nothing where the engine is stock vLLM.

    Args:
        vllm_config: Of the engine.
        engine_indexes: Its data-parallel ranks.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int]) -> None:
        self.withdraws = vllm_config.scheduler_config.scheduler_cls == SCHEDULER
        self.vllm_config = vllm_config
        self.model_name = vllm_config.model_config.served_model_name
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.exit_layers: Histogram | None = None

    def log_engine_initialized(self) -> None:
        """Makes the metrics. Before, vLLM's own logger takes everything named `vllm:` out of the registry."""
        if not self.withdraws:
            return
        from vllm_vtw.startup import vtw_config

        policy = vtw_config(self.vllm_config).policy
        if policy.gate is not None:
            num_layers = self.vllm_config.model_config.hf_text_config.num_hidden_layers
            self.exit_layers = Histogram(
                "vllm:vtw_exit_layer",
                "The layer from which on gates withdrew a request's visual tokens; the number of layers "
                "where they did not.",
                LABELS,
                buckets=[*(stage.layer for stage in policy.stages), num_layers],
            )
        self.counters = {
            REQUESTS: Counter(
                "vllm:vtw_requests",
                "Requests, by the layer from which on their visual tokens are withdrawn; the number of "
                "layers for those that withdraw nothing.",
                [*LABELS, "layer"],
            ),
            WITHDRAWN_TOKENS: Counter(
                "vllm:vtw_withdrawn_tokens",
                "Visual tokens that requests do not hold in a stage, a run of layers that retain the same.",
                [*LABELS, "stage"],
            ),
        }
        self.gauges = {
            KV_BLOCKS: Gauge(
                "vllm:vtw_kv_blocks",
                "KV blocks that running requests hold in a stage, of the one pool for all groups of layers.",
                [*LABELS, "stage"],
                multiprocess_mode="mostrecent",
            ),
            KV_BLOCKS_SAVED: Gauge(
                "vllm:vtw_kv_blocks_saved",
                "KV blocks of the pool that the same requests would hold beyond that in stock vLLM.",
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
        """Takes a scheduler's counts, which come where vLLM reports LoRA adapters: see `VTWScheduler`."""
        if not self.counters or scheduler_stats is None:
            return
        for key, value in scheduler_stats.waiting_lora_adapters.items():
            name, _, label = key.partition("/")
            if name == EXIT_LAYER:
                assert self.exit_layers is not None
                for _ in range(value):
                    self.exit_layers.labels(self.model_name, str(engine_idx)).observe(int(label))
                continue
            labels = [self.model_name, str(engine_idx), *([label] if label else [])]
            if name in self.counters:
                self.counters[name].labels(*labels).inc(value)
            else:
                self.gauges[name].labels(*labels).set(value)
