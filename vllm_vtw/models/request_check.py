# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's input processor, which checks every request before it is queued.

What a request chose is in its sampling parameters, which a model's multimodal processor does not get.
"""

import functools
import inspect
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_vtw.config import ADMISSION
from vllm_vtw.models.admission import check_request, forget_items

TARGET = "process_inputs"
EXTENSION_POINT = "request_checks"
"""A list of functions that vLLM calls with itself, a request's engine input and its parameters."""
PARAMETERS = ["self", "request_id", "prompt", "params"]
"""The first parameters of the method that is wrapped."""


def check(processor: InputProcessor, prompt: Any, params: Any) -> None:
    """Refuses a request that the policy of its engine cannot serve.

    Args:
        processor: The engine's input processor. A process may have several engines.
        prompt: The request's engine input.
        params: Its `SamplingParams`.

    Raises:
        VLLMValidationError: `check_request` refuses it. vLLM's servers answer with HTTP 400.
    """
    admission = getattr(processor.model_config, ADMISSION, None)
    if admission is None:
        return
    try:
        check_request(admission, prompt, params)
    except ValueError as error:
        forget_items(prompt, processor.renderer.mm_processor_cache)
        raise VLLMValidationError(str(error)) from error


def install() -> None:
    """Wraps vLLM's method that checks and converts a request, so that it calls `check` first.

    If vLLM has a list of such checks (`patches/request-check.diff`), `check` is added to it.

    Raises:
        RuntimeError: The method is not the one that the wrapper was written for.
    """
    checks = getattr(InputProcessor, EXTENSION_POINT, None)
    if checks is not None:
        if check not in checks:
            checks.append(check)
        return
    original = getattr(InputProcessor, TARGET, None)
    if hasattr(original, "checks_choice"):
        return
    if original is None or list(inspect.signature(original).parameters)[: len(PARAMETERS)] != PARAMETERS:
        raise RuntimeError(f"vllm-vtw does not know this vLLM's InputProcessor.{TARGET}: install vLLM 0.32.0")

    @functools.wraps(original)
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> Any:
        check(self, prompt, params)
        return original(self, request_id, prompt, params, *args, **options)

    process_inputs.checks_choice = True  # type: ignore[attr-defined]
    setattr(InputProcessor, TARGET, process_inputs)
