"""vLLM's own scheduler, which also tells the stage managers what each request retains."""

import logging
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_vtw.config import EXITS
from vllm_vtw.kv.manager import RequestHashes, StageManager
from vllm_vtw.kv.report import log_startup
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.retention import Question, Retention, decided, is_undecided, request_retentions
from vllm_vtw.startup import refuse_unsupported, refuse_with_question, vtw_config

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
        if self.policy.depends_on_question:
            refuse_with_question(vllm_config, self.policy)
        self.align_to = config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.stage_managers = [manager for manager in managers if isinstance(manager, StageManager)]
        for manager in self.stage_managers:
            manager.retentions = self.retentions
        self.undecided: set[str] = set()
        """Requests that gates have yet to decide about."""
        self.exits: dict[str, int] = {}
        """By request what gates decided: the first stage without visual tokens, or the number of stages."""
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
            if is_undecided(retentions):
                self.undecided.add(request.request_id)
            else:
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
        question = self._question(request)
        if question is not None and not self._fits_a_step(request, question):
            logger.error(
                "vtw: request %s has %d tokens from its first image on, too many for one step, as its policy "
                "takes them: raise --max-num-batched-tokens",
                request.request_id,
                question.stop - question.start,
            )
            self._end_with_error(request)

    def _question(self, request: Request) -> Question | None:
        """What has to be computed in one step of a request's prompt; None for nothing."""
        retentions = self.retentions[request.request_id]
        return retentions[0].question if retentions else None

    def _fits_a_step(self, request: Request, question: Question) -> bool:
        """Whether a step ever takes a prompt from its first picture on, and the encoder's cache its pictures.

        What came through the model's processor has been asked the first already.
        """
        pictures = sum(request.get_num_encoder_embeds(index) for index in range(len(request.mm_features)))
        most = min(self.max_num_encoder_input_tokens, self.encoder_cache_manager.cache_size)
        return question.stop - question.start <= self.max_num_scheduled_tokens and pictures <= most

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
        if self.policy.gate is not None:
            begin = [new.req_id for new in output.scheduled_new_reqs]
            resume = output.scheduled_cached_reqs.resumed_req_ids
            setattr(output, EXITS, {req_id: self.exits.get(req_id) for req_id in (*begin, *resume)})
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
        """vLLM's choice, which may leave out tokens of the step, where it takes all that a prompt has from
        its first picture on, or nothing of that, if what leaves depends on it.

        Where gates are about to decide it takes nothing: under asynchronous scheduling the next step is
        planned before they have.
        """
        question = self._question(request)
        if question is not None and question.gated and num_computed_tokens >= question.stop:
            request.spec_token_ids = []  # model runner V1 knows drafts of the step before alone
            return [], 0, encoder_compute_budget, [], []
        if question is not None and num_computed_tokens <= question.start:
            before = question.start - num_computed_tokens
            if num_computed_tokens + num_new_tokens < question.stop:
                num_new_tokens = min(num_new_tokens, before)
        given = (request, num_computed_tokens, num_new_tokens, encoder_compute_budget)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(*given, *args, **options)
        if question is None or not question.start < num_computed_tokens + chosen[1] < question.stop:
            return chosen
        # Holding on to those of its pictures that are in the encoder's cache, it could wait for room for the
        # others that another request holds on to likewise.
        self.encoder_cache_manager.free(request)
        return [], before, encoder_compute_budget, [], []

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, once every request of the step has the blocks that its gates left to it."""
        for request_id, exit_stage in getattr(model_runner_output, EXITS, {}).items():
            request = self.requests.get(request_id)
            # What ran before vLLM's prefix cache was reset runs again, and is decided again.
            if request is not None and not (request.num_stale_output_tokens and request.drop_stale_output):
                self._decided(request, exit_stage)
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._assert_decided(self.undecided & scheduler_output.num_scheduled_tokens.keys())
        return outputs

    def _assert_decided(self, request_ids: Iterable[str]) -> None:
        """A request that nobody decided about would wait for ever."""
        for request in map(self.requests.__getitem__, request_ids):
            question = self._question(request)
            assert question is not None
            assert request.num_in_flight_tokens or request.num_computed_tokens < question.stop, (
                f"the worker did not say what gates decided about request {request.request_id}"
            )

    def _decided(self, request: Request, exit_stage: int) -> None:
        request_id, hashes = request.request_id, request.block_hashes
        assert isinstance(hashes, RequestHashes)
        hashes.retentions = self.retentions[request_id] = decided(self.retentions[request_id], exit_stage)
        self.undecided.remove(request_id)
        self.exits[request_id] = exit_stage
        layer = self.statistics.count_exit(hashes.retentions)
        logger.debug("vtw: request %s: its visual tokens leave at layer %d", request_id, layer)
        # A request that was preempted meanwhile has no blocks.
        if request.status == RequestStatus.RUNNING:
            for manager in self.stage_managers:
                manager.give_back(request_id, request.num_prompt_tokens)

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
        self.undecided.discard(request.request_id)
        self.exits.pop(request.request_id, None)


class VTWAsyncScheduler(VTWScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **options: Any) -> VTWScheduler:
    """What `--scheduler-cls` names: vLLM settles on asynchronous scheduling after the plugin was asked."""
    chosen = VTWAsyncScheduler if vllm_config.scheduler_config.async_scheduling else VTWScheduler
    return chosen(vllm_config=vllm_config, **options)
