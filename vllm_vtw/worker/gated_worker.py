# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The worker class for policies with gates. It carries decisions from the model to the scheduler and back."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_vtw.config import EXITS
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.platform_worker import PlatformWorker, annotated


class GatedWorker(PlatformWorker):
    """The platform's worker, with decisions of gates added to what it receives and returns.

    It is selected by `--worker-cls`, which the plugin sets where the policy has gates.
    """

    @property
    def _step(self) -> CurrentStep:
        step: CurrentStep = self.model_runner.get_model().vtw_step
        return step

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
        self._step.begun = new | scheduler_output.scheduled_cached_reqs.resumed_req_ids
        self._step.known_exits = getattr(scheduler_output, EXITS, {})
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        exits, self._step.exits = self._step.exits, {}
        return annotated(output, EXITS, exits) if exits else output
