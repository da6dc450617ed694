"""vLLM's own scheduler, which also tells the stage managers what each request retains."""

import logging
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_vtw.kv.manager import RequestHashes, StageManager
from vllm_vtw.kv.report import log_startup
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.retention import Ranking, Retention, request_retentions
from vllm_vtw.startup import refuse_unsupported, refuse_with_ranking, vtw_config

logger = logging.getLogger("vllm.vtw")


class VTWScheduler(Scheduler):
    """Knows every request's retention from its arrival until its blocks are free again.

    Raises:
        ValueError: vLLM settled on an option that the plugin refuses after the plugin had looked.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **options: Any) -> None:
        refuse_unsupported(vllm_config)
        super().__init__(vllm_config, kv_cache_config, **options)
        config = vtw_config(vllm_config)
        self.policy = config.policy
        if self.policy.ranking is not None:
            refuse_with_ranking(vllm_config)
        self.align_to = config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            if isinstance(manager, StageManager):
                manager.retentions = self.retentions
        num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        layers = [*(stage.layer for stage in self.policy.stages), num_layers]
        self.statistics = Statistics(layers, kv_cache_config, managers)
        log_startup(vllm_config, kv_cache_config, config)

    def add_request(self, request: Request) -> None:
        # A session with streaming input adds its id again for every piece of the prompt.
        if request.request_id not in self.requests:
            retentions = request_retentions(
                self.policy, request.mm_features, request.num_prompt_tokens, self.align_to
            )
            self.retentions[request.request_id] = retentions
            self.statistics.count_request(retentions)
            request.block_hashes = RequestHashes(request.block_hashes, retentions)
        super().add_request(request)
        if request.resumable:
            logger.error(
                "vtw: request %s has streaming input, which would change what was withdrawn: "
                "send the whole prompt at once",
                request.request_id,
            )
            self._end_with_error(request)
        ranking = self.retentions[request.request_id][0].ranking if self.policy.ranking else None
        if ranking is not None and not self._fits_a_step(request, ranking):
            logger.error(
                "vtw: request %s has %d tokens from its first image on, too many to be ranked in one step: "
                "raise --max-num-batched-tokens",
                request.request_id,
                ranking.stop - ranking.start,
            )
            self._end_with_error(request)

    def _fits_a_step(self, request: Request, ranking: Ranking) -> bool:
        """Whether a step ever takes a prompt from its first picture on, and the encoder's cache its pictures.

        What came through the model's processor has been asked the first already.
        """
        pictures = sum(request.get_num_encoder_embeds(index) for index in range(len(request.mm_features)))
        most = min(self.max_num_encoder_input_tokens, self.encoder_cache_manager.cache_size)
        return ranking.stop - ranking.start <= self.max_num_scheduled_tokens and pictures <= most

    def _end_with_error(self, request: Request) -> None:
        # vLLM's set of requests that end with an error after the step at hand.
        self.encoder_cache_mismatch_reqs.add(request.request_id)

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """vLLM's step, with the pictures that it leaves out because the cache covers them: model runner V1 is
        told of a request once, so one that is preempted, and finds the cached blocks evicted when it resumes,
        would end the engine with "Encoder cache miss"."""
        output: SchedulerOutput = super().schedule(*args, **options)
        if not self.use_v2_model_runner:
            for new in output.scheduled_new_reqs:
                new.mm_features = self.requests[new.req_id].mm_features
        return output

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **options: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """vLLM's choice, which may leave out tokens of the step, where it takes all that a ranked prompt has
        from its first picture on, or nothing of that."""
        ranking = self.retentions[request.request_id][0].ranking if self.policy.ranking else None
        if ranking is not None and num_computed_tokens <= ranking.start:
            before = ranking.start - num_computed_tokens
            if num_computed_tokens + num_new_tokens < ranking.stop:
                num_new_tokens = min(num_new_tokens, before)
        given = (request, num_computed_tokens, num_new_tokens, encoder_compute_budget)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(*given, *args, **options)
        if ranking is None or not ranking.start < num_computed_tokens + chosen[1] < ranking.stop:
            return chosen
        # Holding on to those of its pictures that are in the encoder's cache, it could wait for room for the
        # others that another request holds on to likewise.
        self.encoder_cache_manager.free(request)
        return [], before, encoder_compute_budget, [], []

    def make_stats(self, *args: Any, **options: Any) -> SchedulerStats | None:
        """vLLM's statistics, and the plugin's in a field that vLLM's loggers read with LoRA only, which is
        refused at start-up: there is none for others."""
        stats: SchedulerStats | None = super().make_stats(*args, **options)
        if stats is not None:
            stats.waiting_lora_adapters = self.statistics.take()
        return stats

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        del self.retentions[request.request_id]


class VTWAsyncScheduler(VTWScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **options: Any) -> VTWScheduler:
    """What `--scheduler-cls` names: vLLM settles on asynchronous scheduling after the plugin was asked."""
    chosen = VTWAsyncScheduler if vllm_config.scheduler_config.async_scheduling else VTWScheduler
    return chosen(vllm_config=vllm_config, **options)
