"""The worker where gates decide: it carries decisions to the scheduler, and those it knows to the model."""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_vtw.config import EXITS
from vllm_vtw.worker.step import CurrentStep

WORKERS = "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"
PlatformWorker: Any = resolve_obj_by_qualname(WORKERS[0] if current_platform.is_cpu() else WORKERS[1])


class WithExits(AsyncModelRunnerOutput):
    """A step's output that is not on the host yet, with what gates decided in the step."""

    def __init__(self, output: AsyncModelRunnerOutput, exits: dict[str, int]) -> None:
        self.output, self.exits = output, exits

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        setattr(output, EXITS, self.exits)
        return output


class GatedWorker(PlatformWorker):
    """The platform's worker. `--worker-cls` is vLLM's way to name another."""

    @property
    def _step(self) -> CurrentStep:
        step: CurrentStep = self.model_runner.get_model().step
        return step

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._step.known_exits = getattr(scheduler_output, EXITS, {})
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        exits, self._step.exits = self._step.exits, {}
        if not exits:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return WithExits(output, exits)
        setattr(output, EXITS, exits)
        return output
