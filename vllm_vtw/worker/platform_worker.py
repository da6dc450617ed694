# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's worker class for the present platform, which the plugin's workers subclass, and its output."""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

WORKERS = "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"
PlatformWorker: Any = resolve_obj_by_qualname(WORKERS[0] if current_platform.is_cpu() else WORKERS[1])


class AnnotatedOutput(AsyncModelRunnerOutput):
    """A step's output that is still on the device, with an attribute for the scheduler."""

    def __init__(self, output: AsyncModelRunnerOutput, name: str, value: Any) -> None:
        self.output, self.name, self.value = output, name, value

    def get_output(self) -> ModelRunnerOutput:
        output = self.output.get_output()
        setattr(output, self.name, self.value)
        return output

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """What a KV connector did in the step. vLLM calls this since 0.33, if `get_output` fails."""
        return self.output.get_kv_connector_output()


def annotated(output: Any, name: str, value: Any) -> Any:
    """Adds an attribute for the scheduler to what a worker returns of a step."""
    if isinstance(output, AsyncModelRunnerOutput):
        return AnnotatedOutput(output, name, value)
    setattr(output, name, value)
    return output
