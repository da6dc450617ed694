# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a worker returns of a step, with an attribute for the scheduler."""

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from vllm_vtw.worker.platform_worker import annotated


class OnDevice(AsyncModelRunnerOutput):
    """A step's output that is still on the device."""

    connector = KVConnectorOutput()

    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput([], {})

    def get_kv_connector_output(self) -> KVConnectorOutput:
        return self.connector


def test_an_output_gets_an_attribute_at_once_or_when_it_has_come():
    here: Any = ModelRunnerOutput([], {})
    assert annotated(here, "told", 1) is here
    there: Any = annotated(OnDevice(), "told", 2)
    assert (here.told, there.get_output().told) == (1, 2)


def test_what_a_connector_did_is_that_of_the_output_itself():
    """vLLM 0.33 asks for it where the output fails."""
    assert annotated(OnDevice(), "told", 2).get_kv_connector_output() is OnDevice.connector
