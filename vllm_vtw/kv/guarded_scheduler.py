# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's scheduler, which also schedules the readings of a guard, behind all requests of users."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_vtw.kv.guard import CLIENT, FAILED, Guard

STEP_TOKENS = 256
"""The largest number of tokens of a reading that a step computes. The next tokens of running requests are
later by the time that these take."""


class GuardedScheduler(Scheduler):
    """Reads answers again where there is room for it.

    One answer is read at a time. A reading begins only if no request waits or computes its prompt, and if the
    blocks that it needs are free. Its tokens are the last ones that a step has room for. It sits out the
    steps in which requests of users wait, and ends if one of these still waits after such a step, or if a
    running request needs its blocks.

    Attributes:
        guard: Chooses and judges answers. None if there is none.
    """

    running: list[Request]
    guard: Guard | None = None

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        sitting_out = [] if self.guard is None else self._make_way(self.guard)
        output: SchedulerOutput = super().schedule(*args, **options)
        self.running += sitting_out
        assert not sitting_out or len(self.running) <= self.max_num_running_reqs
        return output

    def _make_way(self, guard: Guard) -> list[Request]:
        """Begins, goes on with, or ends a reading.

        Returns:
            The running requests that sit the step out.
        """
        request = self.requests.get(guard.request_id)
        if request is None:
            if guard.request_id:
                guard.leave_out(FAILED)
            self._begin_reading(guard)
            return []
        if request.status == RequestStatus.RUNNING and request not in self.running:
            return []  # the step belongs to one prompt
        _, num_waiting = self.get_request_counts()
        # Model runner V2 has no row to spare. If users may need that of a reading that sits the step out, the
        # worker has to be told that it is free in this step.
        no_seat = len(self.running) + num_waiting > self.max_num_running_reqs
        # vLLM admits a user's adapter if it fits beside those of the requests that are in the step.
        must_stop = guard.sat_out or no_seat or self.lora_config is not None
        has_room = request.status == RequestStatus.RUNNING and not guard.needs_room
        if not has_room or (num_waiting and must_stop):
            self._stop_reading()
            return []
        guard.sat_out = num_waiting > 0
        # vLLM preempts the last one first.
        self.running = [other for other in self.running if other is not request]
        if num_waiting:
            return [request]
        self.running.append(request)
        return []

    def _begin_reading(self, guard: Guard) -> None:
        _, num_waiting = self.get_request_counts()
        if (
            guard.num_answers
            and not num_waiting
            and len(self.running) < self.max_num_running_reqs
            and not any(request.is_prefill_chunk for request in self.running)
            and self.pause_state == PauseState.UNPAUSED
            and self._blocks_suffice(guard.num_tokens)
            and self._adapters_fit(guard.next_adapter)
        ):
            self.add_request(guard.next_reading())

    def _adapters_fit(self, adapter: LoRARequest | None) -> bool:
        """Whether a step has room for a LoRA adapter beside those of the running requests."""
        if self.lora_config is None:
            return True
        used = {request.lora_request.lora_int_id for request in self.running if request.lora_request}
        if adapter is not None:
            used.add(adapter.lora_int_id)
        return len(used) <= self.lora_config.max_loras

    def _blocks_suffice(self, num_tokens: int) -> bool:
        """Whether blocks are free for a request without withdrawal, and one more for each running request."""
        needed: Counter[Any] = Counter()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            needed[manager.block_pool] += -(-num_tokens // manager.block_size) + len(self.running)
        return all(blocks <= pool.get_num_free_blocks() for pool, blocks in needed.items())

    def _stop_reading(self) -> None:
        assert self.guard is not None
        super().finish_requests(self.guard.request_id, RequestStatus.FINISHED_ABORTED)
        self.guard.stop()

    def _give_up_answers(self) -> None:
        """Ends the reading and gives up all answers. The engine may be about to get other weights."""
        if self.guard is not None:
            super().finish_requests(self.guard.request_id, RequestStatus.FINISHED_ABORTED)
            self.guard.clear()

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **options: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        if request.client_index == CLIENT:
            num_new_tokens = min(num_new_tokens, STEP_TOKENS)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **options
        )
        if self.guard is not None and request.client_index != CLIENT and chosen[1] == 0 < num_new_tokens:
            # The images of the answer that is being read may fill the encoder cache.
            self.guard.needs_room = True
        return chosen

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self.guard is not None:
            logprobs = model_runner_output.prompt_logprobs_dict.get(self.guard.request_id)
            if logprobs is not None:
                self.guard.take(logprobs)
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        of_guard = outputs.pop(CLIENT, None)
        if of_guard is not None and of_guard.scheduler_stats is not None:
            outputs.setdefault(0, EngineCoreOutputs()).scheduler_stats = of_guard.scheduler_stats
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if request_ids is None:
            self._give_up_answers()
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        return finished

    def reset_prefix_cache(self, *args: Any, **options: Any) -> bool:
        self._give_up_answers()
        reset: bool = super().reset_prefix_cache(*args, **options)
        return reset

    def set_pause_state(self, pause_state: PauseState) -> None:
        self._give_up_answers()
        super().set_pause_state(pause_state)

    def get_request_counts(self) -> tuple[int, int]:
        """The numbers of users' requests that run and that wait, which load balancers look at."""
        running, waiting = super().get_request_counts()
        request = None if self.guard is None else self.requests.get(self.guard.request_id)
        if request is None:
            return running, waiting
        if request.status == RequestStatus.RUNNING:
            # It is not among the running ones while it sits a step out.
            return running - (request in self.running), waiting
        return running, waiting - 1

    def get_num_unfinished_requests(self) -> int:
        """The number of users' requests that are not finished, and of answers that are still to be read."""
        unfinished: int = super().get_num_unfinished_requests()
        if self.guard is None or self.pause_state != PauseState.UNPAUSED:
            return unfinished
        return unfinished + self.guard.num_answers
