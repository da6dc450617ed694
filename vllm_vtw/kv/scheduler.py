# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's scheduler, which also tells the managers of the stages what each request retains."""

import logging
from typing import Any

from vllm.config import VllmConfig
from vllm.outputs import RequestError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_vtw.choice import PREFIX, Choice, choice_of
from vllm_vtw.config import EXITS, ORDERS, WANTED
from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.kv.encoder_lookahead import EncoderLookahead
from vllm_vtw.kv.guard import CLIENT, Guard
from vllm_vtw.kv.image_orders import AwaitingRequest
from vllm_vtw.kv.prefill_turns import Turns
from vllm_vtw.kv.stage_block_manager import StagedBlockHashes
from vllm_vtw.kv.startup_log import log_startup
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.metrics import OWN_KEY
from vllm_vtw.policy import BY_FEATURES
from vllm_vtw.retention import (
    OneStepPrefill,
    Retention,
    after_exit,
    awaits_gates,
    awaits_image,
    request_retentions,
)
from vllm_vtw.startup.options import layer_groups, vtw_config
from vllm_vtw.startup.refusals import (
    refuse_unsupported,
    refuse_unsupported_dynamic,
    refuse_unsupported_features,
)

logger = logging.getLogger("vllm.vtw")


class VTWScheduler(EncoderLookahead):
    """Knows every request's retention, from its arrival until its blocks are free again.

    Attributes:
        withdrawal_policy: What is withdrawn. (`policy` is vLLM's scheduling policy.)
        align_to: As `request_retentions` takes it.
        bridge: As `request_retentions` takes it.
        num_layers: The number of decoder layers.
        retentions: By request id, the retention of every stage past the first.
        tasks: By request id, the name of the task that the request chose, or "".
        awaiting_gates: Ids of requests that gates have yet to decide about.
        exits: By request id, what gates decided: the first stage that runs without the request's visual
            tokens, or None if they stay.
        ended_in_flight: By id of a request that has ended, the number of its tokens in steps whose results
            have not come back yet.
        ranks_features: Whether the policy ranks visual tokens by features of images.
        turns: Which prompt gets a step of its own.
        statistics: What is counted for `/metrics`.

    Raises:
        ValueError: After the plugin had checked the configuration, vLLM set an option that it refuses.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **options: Any) -> None:
        refuse_unsupported(vllm_config)
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.use_eagle_block_drop():
            # Otherwise, vLLM would recompute the last cached block of all groups, not only the drafter's.
            kv_cache_config.kv_cache_groups[0].is_eagle_group = True
        super().__init__(vllm_config, kv_cache_config, **options)
        config = vtw_config(vllm_config)
        self.withdrawal_policy = config.policy
        if self.withdrawal_policy.is_dynamic:
            refuse_unsupported_dynamic(vllm_config, self.withdrawal_policy)
        self.align_to = config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self.bridge = config.bridge
        self.num_layers = config.num_layers
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        self.tasks: dict[str, str] = {}
        StagedKVCacheManager.adopt(self.kv_cache_manager)
        self.stage_managers = self.kv_cache_manager.stage_managers
        for manager in self.stage_managers:
            manager.retentions = self.retentions
            manager.shares_parts = self.connector is None
        self.awaiting_gates: set[str] = set()
        self.exits: dict[str, int | None] = {}
        self.ended_in_flight: dict[str, int] = {}
        self.ranks_features = self.withdrawal_policy.ranking in BY_FEATURES
        if self.ranks_features:
            refuse_unsupported_features(vllm_config)
        self.turns = Turns()
        groups = layer_groups(vllm_config, config.policy)
        layers = [*(stage.layer for stage in self.withdrawal_policy.stages), self.num_layers]
        self.statistics = Statistics(layers, groups, self.kv_cache_manager)
        if config.guard_share:
            self.guard = Guard(
                config.guard_share,
                config.policy,
                config.bridge,
                config.num_layers,
                vllm_config.model_config.max_model_len,
                self.statistics,
            )
        log_startup(vllm_config, kv_cache_config, groups, config)

    def add_request(self, request: Request) -> None:
        # A session with streaming input adds its id again for every piece of the prompt.
        wrong_choice = None
        if request.request_id not in self.requests:
            try:
                choice = choice_of(self.withdrawal_policy, self.num_layers, request.sampling_params)
            except ValueError as error:
                # The API process has not checked it. Workers must not read it.
                choice, wrong_choice = Choice(), str(error)
                self._forget_choice(request)
            self._retain(request, choice)
        super().add_request(request)
        if wrong_choice is not None:
            self._end_with_error(request, f"cannot have its choice: {wrong_choice}")
        if request.resumable:
            self._end_with_error(
                request,
                "has streaming input, which would change what was withdrawn: send the whole prompt at once",
            )
        if request.request_id in self.ended_in_flight:
            self._end_with_error(
                request, "has the id of a request that is still being computed: give every request its own id"
            )
        one_step = self._one_step(request)
        # A prompt that came through the model's processor has passed this check before it was queued.
        if one_step is not None and one_step.stop - one_step.start > self.max_num_scheduled_tokens:
            self._end_with_error(
                request,
                f"has {one_step.stop - one_step.start} tokens from its first image on, which its policy "
                f"computes in one step, and a step has room for {self.max_num_scheduled_tokens}: raise "
                "--max-num-batched-tokens",
            )

    def _retain(self, request: Request, choice: Choice) -> None:
        """Finds out what the stages retain of a request that arrives."""
        if self.ranks_features:
            self.image_orders.admit(request)
        retentions = self._retentions_of(request, choice)
        self.retentions[request.request_id] = retentions
        self.tasks[request.request_id] = choice.task
        request.block_hashes = StagedBlockHashes(request.block_hashes, retentions)
        if awaits_gates(retentions):
            self.awaiting_gates.add(request.request_id)
        elif awaits_image(retentions):
            self.image_orders.awaiting[request.request_id] = AwaitingRequest(request, choice)
        else:
            self._count(request, choice)

    def _retentions_of(self, request: Request, choice: Choice) -> tuple[Retention, ...]:
        return request_retentions(
            self.withdrawal_policy,
            request.mm_features,
            request.num_prompt_tokens,
            self.align_to,
            self.bridge,
            choice.layer,
            choice.keep,
            self.image_orders.of_request.get(request.request_id, {}),
        )

    def _count(self, request: Request, choice: Choice) -> None:
        """Counts a user's request whose retention is known."""
        if request.client_index == CLIENT:
            return
        layer = self.statistics.count_request(self.retentions[request.request_id], choice.task)
        if choice != Choice():
            logger.debug(
                "vtw: request %s%s chose that its visual tokens leave at layer %d%s",
                request.request_id,
                f" of task {choice.task!r}" if choice.task else "",
                layer,
                "" if choice.keep is None else f", but for {choice.keep:g} of them",
            )

    @staticmethod
    def _forget_choice(request: Request) -> None:
        """Removes the choice of a request that has a wrong one."""
        assert request.sampling_params is not None
        params = request.sampling_params.clone()
        params.extra_args = {
            key: value for key, value in params.extra_args.items() if not key.startswith(PREFIX)
        }
        request.sampling_params = params

    def _one_step(self, request: Request) -> OneStepPrefill | None:
        """The part of a request's prompt that has to be computed in one step, if there is one."""
        retentions = self.retentions[request.request_id]
        return retentions[0].one_step if retentions else None

    def _end_with_error(self, request: Request, reason: str) -> None:
        """Ends one request with an error after the current step. All others go on.

        Since 0.33, vLLM can tell the client the reason.
        """
        logger.error("vtw: request %s %s", request.request_id, reason)
        # vLLM ends the requests of either collection with an error.
        if isinstance(self.grammar_compile_error_reqs, dict):
            error = RequestError("vtw", f"The request {reason}.")
            self.grammar_compile_error_reqs[request.request_id] = error
        else:
            self.encoder_cache_mismatch_reqs.add(request.request_id)

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """Schedules a step, or a step for one prompt alone if that prompt has waited long enough for room.

        Model runner V1 gets the pixels of all of a request's images, also of those that the prefix cache
        covers and that vLLM leaves out. Otherwise a request that is preempted, and finds its cached blocks
        evicted when it resumes, would end the engine with "Encoder cache miss".
        """
        sitting_out = self._give_step_to(self.turns.owner_of(self.current_step + 1))
        output: SchedulerOutput = super().schedule(*args, **options)
        self.running = sitting_out + self.running
        for manager in self.stage_managers:
            manager.offer_parts()
        for request_id in output.num_scheduled_tokens.keys() & self.turns.since.keys():
            request = self.requests[request_id]
            one_step = self._one_step(request)
            if one_step is None or request.num_computed_tokens >= one_step.stop:
                self.turns.forget(request_id)
        if not self.use_v2_model_runner:
            for new in output.scheduled_new_reqs:
                new.mm_features = self.requests[new.req_id].mm_features
        if self.withdrawal_policy.gate is not None:
            begun = {new.req_id for new in output.scheduled_new_reqs}
            begun |= output.scheduled_cached_reqs.resumed_req_ids
            setattr(output, EXITS, {req_id: self.exits[req_id] for req_id in begun & self.exits.keys()})
        if self.ranks_features:
            self.image_orders.tell(output, self.encoder_cache_manager)
        return output

    def _give_step_to(self, request_id: str | None) -> list[Request]:
        """Puts a request first in the next step.

        Returns:
            The running requests that sit the step out.
        """
        request = None if request_id is None else self.requests[request_id]
        if request is None:
            return []
        if request.status == RequestStatus.RUNNING:
            self.running = [request, *(other for other in self.running if other is not request)]
        elif len(self.running) < self.max_num_running_reqs and self._adapters_fit(request.lora_request):
            # No other request is admitted in this step, so the number of running requests stays within
            # vLLM's limit.
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
        """vLLM's choice of images to encode, which may also reduce the number of tokens of the step.

        The part of a prompt that has to be computed in one step is taken whole or not at all.

        An image whose order is not known yet is encoded before its tokens are computed; see `_encode_ahead`.

        While gates are about to decide about a request, nothing of it is scheduled. Under asynchronous
        scheduling, the next step is scheduled before they have decided.
        """
        one_step = self._one_step(request)
        nothing: tuple[list[int], int, int, list[int], list[int]] = ([], 0, encoder_compute_budget, [], [])
        if one_step is not None and one_step.gated and num_computed_tokens >= one_step.stop:
            request.spec_token_ids = []  # model runner V1 only knows the draft tokens of the step before
            return nothing
        if one_step is not None and one_step.start < num_computed_tokens < one_step.stop:
            self._end_with_error(request, "was cut inside the part of its prompt that goes into one step")
            return nothing
        if one_step is not None and num_computed_tokens <= one_step.start:
            before = one_step.start - num_computed_tokens
            if num_computed_tokens + num_new_tokens < one_step.stop:
                self.turns.passed_over(request.request_id, self.current_step)
                num_new_tokens = min(num_new_tokens, before)
        given = (request, num_computed_tokens, num_new_tokens, encoder_compute_budget)
        if awaits_image(self.retentions[request.request_id]):
            awaits_from = self.retentions[request.request_id][0].awaits_from
            assert awaits_from is not None
            return self._encode_ahead(awaits_from, *given, *args, **options)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(*given, *args, **options)
        if one_step is None or not one_step.start < num_computed_tokens + chosen[1] < one_step.stop:
            return chosen
        # There is no room for all of the images. If the request held on to those that are in the encoder
        # cache, two such requests could wait for each other forever.
        self.encoder_cache_manager.free(request)
        self.turns.passed_over(request.request_id, self.current_step)
        return [], before, encoder_compute_budget, [], []

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Applies what gates and rankings by features decided in the step, then does what vLLM does."""
        for request_id, exit_stage in getattr(model_runner_output, EXITS, {}).items():
            request = self.requests.get(request_id)
            # The decision may be about a request that has ended, whose id may have been used again.
            if request is None or request_id not in self.awaiting_gates or request_id in self.ended_in_flight:
                continue
            # What was computed before vLLM's prefix cache was reset is computed again, and decided again.
            if not (request.num_stale_output_tokens and request.drop_stale_output):
                self._apply_exit(request, exit_stage)
        if self.ranks_features:
            wanted = getattr(scheduler_output, WANTED, [])
            orders = getattr(model_runner_output, ORDERS, {})
            for waiting, is_answered in self.image_orders.take(wanted, orders):
                self._apply_orders(waiting, is_answered)
        scheduled = scheduler_output.num_scheduled_tokens
        self._note_results_of_ended(scheduled)
        for request_id in self.awaiting_gates & scheduled.keys():
            request = self.requests[request_id]
            in_flight = request.num_in_flight_tokens - scheduled[request_id]
            one_step = self._one_step(request)
            if one_step is not None and request.num_computed_tokens - in_flight >= one_step.stop:
                # Without a decision the request would wait forever.
                self._end_with_error(request, "has no decision of its gates: its worker sent none")
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        return outputs

    def _note_results_of_ended(self, scheduled: dict[str, int]) -> None:
        """Counts down `ended_in_flight` as results of ended requests come back. Steps return in order."""
        for request_id in self.ended_in_flight.keys() & scheduled.keys():
            self.ended_in_flight[request_id] -= scheduled[request_id]
            if self.ended_in_flight[request_id] <= 0:
                del self.ended_in_flight[request_id]

    def _apply_orders(self, waiting: AwaitingRequest, is_answered: bool) -> None:
        request, choice = waiting
        if not is_answered:
            # Without an order the request would wait forever.
            self._end_with_error(request, "has an image without an order: its worker sent none")
            return
        hashes = request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        retentions = self._retentions_of(request, choice)
        hashes.retentions = self.retentions[request.request_id] = retentions
        if not awaits_image(retentions):
            del self.image_orders.awaiting[request.request_id]
            self._count(request, choice)

    def _apply_exit(self, request: Request, exit_stage: int | None) -> None:
        request_id, hashes = request.request_id, request.block_hashes
        assert isinstance(hashes, StagedBlockHashes)
        hashes.retentions = self.retentions[request_id] = after_exit(self.retentions[request_id], exit_stage)
        self.awaiting_gates.remove(request_id)
        self.exits[request_id] = exit_stage
        layer = self.statistics.count_exit(hashes.retentions)
        logger.debug("vtw: request %s: its visual tokens leave at layer %d", request_id, layer)
        # A request that was preempted in the meantime has no blocks.
        if request.status == RequestStatus.RUNNING:
            for manager in self.stage_managers:
                if manager.stage > 0:
                    manager.free_tail(request_id, request.num_prompt_tokens)

    def make_stats(self, *args: Any, **options: Any) -> SchedulerStats | None:
        """Adds the plugin's statistics to vLLM's.

        vLLM sends the fields of `SchedulerStats` to the front end and nothing else, so they need a field that
        has the type `dict[str, int]`. vLLM adds the names of LoRA adapters to `waiting_lora_adapters` in the
        front end; `WithdrawalMetrics.record` takes the plugin's own keys out before vLLM shows them. Offline
        engines have no such logger: with LoRA and `disable_log_stats=False`, their `vllm:lora_requests_info`
        has these keys among its names.
        """
        stats: SchedulerStats | None = super().make_stats(*args, **options)
        if stats is not None:
            counts = self.statistics.take(self.running)
            stats.waiting_lora_adapters = {OWN_KEY + key: count for key, count in counts.items()}
        return stats

    def _free_blocks(self, request: Request) -> None:
        request_id = request.request_id
        if self.guard is not None:
            self.guard.consider(request, self.retentions[request_id], self.tasks[request_id])
        super()._free_blocks(request)
        self.retentions.pop(request_id, None)
        self.tasks.pop(request_id, None)
        self.awaiting_gates.discard(request_id)
        self.exits.pop(request_id, None)
        self.turns.forget(request_id)
        if self.ranks_features:
            self.image_orders.forget(request_id)
        if self.withdrawal_policy.gate is not None and request.num_in_flight_tokens > 0:
            self.ended_in_flight[request_id] = request.num_in_flight_tokens


class VTWAsyncScheduler(VTWScheduler, AsyncScheduler):
    """The same on top of vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, **options: Any) -> VTWScheduler:
    """Makes the scheduler. `--scheduler-cls` names this function.

    A class will not do: vLLM chooses between synchronous and asynchronous scheduling after the plugin has
    set `--scheduler-cls`.
    """
    chosen = VTWAsyncScheduler if vllm_config.scheduler_config.async_scheduling else VTWScheduler
    return chosen(vllm_config=vllm_config, **options)
