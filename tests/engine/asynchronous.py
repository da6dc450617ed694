# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Model runner V2 on a CPU, with the asynchronous scheduling that vLLM switches off there."""

from typing import Any

from tests.engine import triton_interpreter

assert triton_interpreter.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"

from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform

original_check: Any = CpuPlatform.check_and_update_config.__func__


def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
    """In place of the platform's."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    original_check(cls, vllm_config)
    vllm_config.scheduler_config.async_scheduling = asynchronous


CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
