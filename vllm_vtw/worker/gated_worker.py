# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The worker class for policies with gates. It carries decisions from the model to the scheduler and back."""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_vtw.config import EXITS
from vllm_vtw.worker.current_step import CurrentStep

WORKERS = "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"
PlatformWorker: Any = resolve_obj_by_qualname(WORKERS[0] if current_platform.is_cpu() else WORKERS[1])


class OutputWithExits(AsyncModelRunnerOutput):
    """A step's output that is still on the device, with what the gates decided in the step."""

    def __init__(self, output: AsyncModelRunnerOutput, exits: dict[str, int | None]) -> None:
        self.output, self.exits = output, exits

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        setattr(output, EXITS, self.exits)
        return output


class GatedWorker(PlatformWorker):
    """The platform's worker, with decisions of gates added to what it receives and returns.

    It is selected by `--worker-cls`, which the plugin sets where the policy has gates.
    """

    @property
    def _step(self) -> CurrentStep:
        step: CurrentStep = self.model_runner.get_model().step
        return step

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
        self._step.begun = new | scheduler_output.scheduled_cached_reqs.resumed_req_ids
        self._step.known_exits = getattr(scheduler_output, EXITS, {})
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        exits, self._step.exits = self._step.exits, {}
        if not exits:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return OutputWithExits(output, exits)
        setattr(output, EXITS, exits)
        return output
