"""vLLM's own scheduler, which also tells the stage managers what each request retains."""

import logging
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
from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.kv.manager import RequestHashes
from vllm_vtw.kv.report import log_startup
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.kv.turns import Turns
from vllm_vtw.retention import Question, Retention, decided, is_undecided, request_retentions
from vllm_vtw.startup import refuse_unsupported, refuse_with_question, vtw_config

logger = logging.getLogger("vllm.vtw")


class VTWScheduler(Scheduler):
    """Knows every request's retention from its arrival until its blocks are free again.

    Raises:
        ValueError: vLLM settled on an option that the plugin refuses after the plugin had looked.
    """

    running: list[Request]

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **options: Any) -> None:
        refuse_unsupported(vllm_config)
        super().__init__(vllm_config, kv_cache_config, **options)
        config = vtw_config(vllm_config)
        self.withdrawal = config.policy
        if self.withdrawal.depends_on_question:
            refuse_with_question(vllm_config, self.withdrawal)
        self.align_to = config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        StagedKVCacheManager.adopt(self.kv_cache_manager)
        self.stage_managers = self.kv_cache_manager.stage_managers
        for manager in self.stage_managers:
            manager.retentions = self.retentions
        self.undecided: set[str] = set()
        """Requests that gates have yet to decide about."""
        self.exits: dict[str, int] = {}
        """By request what gates decided: the first stage without visual tokens, or the number of stages."""
        self.ended_in_flight: dict[str, int] = {}
        """By id of a request that has ended: its tokens in steps whose results have yet to come."""
        self.turns = Turns()
        num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        layers = [*(stage.layer for stage in self.withdrawal.stages), num_layers]
        self.statistics = Statistics(layers, kv_cache_config, self.kv_cache_manager)
        log_startup(vllm_config, kv_cache_config, config)

    def add_request(self, request: Request) -> None:
        # A session with streaming input adds its id again for every piece of the prompt.
        if request.request_id not in self.requests:
            retentions = request_retentions(
                self.withdrawal, request.mm_features, request.num_prompt_tokens, self.align_to
            )
            self.retentions[request.request_id] = retentions
            if is_undecided(retentions):
                self.undecided.add(request.request_id)
            else:
                self.statistics.count_request(retentions)
            request.block_hashes = RequestHashes(request.block_hashes, retentions)
        super().add_request(request)
        if request.resumable:
            self._end_with_error(
                request,
                "has streaming input, which would change what was withdrawn: send the whole prompt at once",
            )
        if request.request_id in self.ended_in_flight:
            self._end_with_error(
                request, "has the id of a request that is still being computed: give every request its own"
            )
        question = self._question(request)
        # What came through the model's processor was asked this before it was queued.
        if question is not None and question.stop - question.start > self.max_num_scheduled_tokens:
            self._end_with_error(
                request,
                f"has {question.stop - question.start} tokens from its first image on, too many for one "
                f"step, as its policy takes them: raise --max-num-batched-tokens "
                f"({self.max_num_scheduled_tokens})",
            )

    def _question(self, request: Request) -> Question | None:
        """What has to be computed in one step of a request's prompt; None for nothing."""
        retentions = self.retentions[request.request_id]
        return retentions[0].question if retentions else None

    def _end_with_error(self, request: Request, reason: str) -> None:
        """Ends one request, and nothing else, after the step at hand."""
        logger.error("vtw: request %s %s", request.request_id, reason)
        # vLLM's set of requests that end with an error.
        self.encoder_cache_mismatch_reqs.add(request.request_id)

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """vLLM's step, or one of a prompt's own, where it waited long enough for room.

        It carries the pictures that vLLM leaves out because the cache covers them: model runner V1 is told of
        a request once, so one that is preempted, and finds the cached blocks evicted when it resumes, would
        end the engine with "Encoder cache miss".
        """
        sitting_out = self._make_room(self.turns.whose(self.current_step + 1))
        output: SchedulerOutput = super().schedule(*args, **options)
        self.running = sitting_out + self.running
        for request_id in output.num_scheduled_tokens.keys() & self.turns.since.keys():
            request = self.requests[request_id]
            question = self._question(request)
            if question is None or request.num_computed_tokens >= question.stop:
                self.turns.forget(request_id)
        if not self.use_v2_model_runner:
            for new in output.scheduled_new_reqs:
                new.mm_features = self.requests[new.req_id].mm_features
        if self.withdrawal.gate is not None:
            begin = [new.req_id for new in output.scheduled_new_reqs]
            resume = output.scheduled_cached_reqs.resumed_req_ids
            setattr(output, EXITS, {req_id: self.exits.get(req_id) for req_id in (*begin, *resume)})
        return output

    def _make_room(self, request_id: str | None) -> list[Request]:
        """Puts a request before all others in the next step. Returns the running requests that sit it out."""
        request = None if request_id is None else self.requests[request_id]
        if request is None:
            return []
        if request.status == RequestStatus.RUNNING:
            self.running = [request, *(other for other in self.running if other is not request)]
        elif len(self.running) < self.max_num_running_reqs:
            # Nobody else is admitted in this step, so what runs behind it stays within vLLM's limit.
            sitting_out, self.running = self.running, []
            return sitting_out
        return []

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        ready: bool = super()._handle_blocked_waiting_request(request)
        return ready and self.turns.admits(request.request_id, self.current_step)

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
        nothing: tuple[list[int], int, int, list[int], list[int]] = ([], 0, encoder_compute_budget, [], [])
        if question is not None and question.gated and num_computed_tokens >= question.stop:
            request.spec_token_ids = []  # model runner V1 knows drafts of the step before alone
            return nothing
        if question is not None and question.start < num_computed_tokens < question.stop:
            self._end_with_error(request, "was cut inside the part of its prompt that goes into one step")
            return nothing
        if question is not None and num_computed_tokens <= question.start:
            before = question.start - num_computed_tokens
            if num_computed_tokens + num_new_tokens < question.stop:
                self.turns.passed_over(request.request_id, self.current_step)
                num_new_tokens = min(num_new_tokens, before)
        given = (request, num_computed_tokens, num_new_tokens, encoder_compute_budget)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(*given, *args, **options)
        if question is None or not question.start < num_computed_tokens + chosen[1] < question.stop:
            return chosen
        # Holding on to those of its pictures that are in the encoder's cache, it could wait for room for the
        # others that another request holds on to likewise.
        self.encoder_cache_manager.free(request)
        self.turns.passed_over(request.request_id, self.current_step)
        return [], before, encoder_compute_budget, [], []

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, once every request of the step has the blocks that its gates left to it."""
        for request_id, exit_stage in getattr(model_runner_output, EXITS, {}).items():
            request = self.requests.get(request_id)
            # Whose decision came too late, or was about a request of the same id before, has none.
            if request is None or request_id not in self.undecided or request_id in self.ended_in_flight:
                continue
            # What ran before vLLM's prefix cache was reset runs again, and is decided again.
            if not (request.num_stale_output_tokens and request.drop_stale_output):
                self._decided(request, exit_stage)
        scheduled = scheduler_output.num_scheduled_tokens
        self._note_results_of_ended(scheduled)
        for request_id in self.undecided & scheduled.keys():
            request = self.requests[request_id]
            in_flight = request.num_in_flight_tokens - scheduled[request_id]
            question = self._question(request)
            if question is not None and request.num_computed_tokens - in_flight >= question.stop:
                # It would wait for ever.
                self._end_with_error(request, "has no decision of its gates: its worker sent none")
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        return outputs

    def _note_results_of_ended(self, scheduled: dict[str, int]) -> None:
        """Counts the tokens of ended requests whose results are here: steps return in order."""
        for request_id in self.ended_in_flight.keys() & scheduled.keys():
            self.ended_in_flight[request_id] -= scheduled[request_id]
            if self.ended_in_flight[request_id] <= 0:
                del self.ended_in_flight[request_id]

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
        request_id = request.request_id
        self.retentions.pop(request_id, None)
        self.undecided.discard(request_id)
        self.exits.pop(request_id, None)
        self.turns.forget(request_id)
        if self.withdrawal.gate is not None and request.num_in_flight_tokens > 0:
            self.ended_in_flight[request_id] = request.num_in_flight_tokens


class VTWAsyncScheduler(VTWScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **options: Any) -> VTWScheduler:
    """What `--scheduler-cls` names: vLLM settles on asynchronous scheduling after the plugin was asked."""
    chosen = VTWAsyncScheduler if vllm_config.scheduler_config.async_scheduling else VTWScheduler
    return chosen(vllm_config=vllm_config, **options)
