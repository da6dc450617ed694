"""vLLM's own schedulers, which also tell the stage managers what each request retains."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_vtw.kv.manager import StageManager
from vllm_vtw.kv.report import log_startup
from vllm_vtw.retention import Retention, request_retentions
from vllm_vtw.startup import vtw_config


class VTWScheduler(Scheduler):
    """Knows every request's retention from its arrival until its blocks are free again."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **options: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, **options)
        config = vtw_config(vllm_config)
        self.policy = config.policy
        self.align_to = self.cache_config.block_size if config.align else 1
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        managers = self.kv_cache_manager.coordinator.single_type_managers
        stage_managers = [manager for manager in managers if isinstance(manager, StageManager)]
        if self.policy.stages and not stage_managers:
            raise ValueError(
                "--model-impl vtw needs vLLM's hybrid KV cache manager, which is off: "
                "remove --disable-hybrid-kv-cache-manager"
            )
        for manager in stage_managers:
            manager.retentions = self.retentions
        log_startup(vllm_config, kv_cache_config, config)

    def add_request(self, request: Request) -> None:
        self.retentions[request.request_id] = request_retentions(
            self.policy, request.mm_features, request.num_prompt_tokens, self.align_to
        )
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        del self.retentions[request.request_id]


class AsyncVTWScheduler(VTWScheduler, AsyncScheduler):
    """The same on vLLM's asynchronous scheduler."""


def create_scheduler(vllm_config: VllmConfig, **options: Any) -> Scheduler:
    """What `--scheduler-cls` is set to: vLLM decides on asynchronous scheduling after the plugin ran."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    return (AsyncVTWScheduler if asynchronous else VTWScheduler)(vllm_config=vllm_config, **options)
