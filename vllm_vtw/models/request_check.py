# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's engines, in the process that receives requests, which checks every request first.

What a request chose is in its sampling parameters, which a model's multimodal processor does not get. An
error has to be raised while the request is handed over: later, the server may have begun to stream with HTTP
200.
"""

import functools
import inspect
import operator
from typing import Any, NamedTuple

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_vtw.config import ADMISSION
from vllm_vtw.models.admission import check_request, forget_items
from vllm_vtw.versions import unknown


class Target(NamedTuple):
    """A method that is wrapped.

    Attributes:
        owner: The class that has it.
        name: Its name.
        prompt: The name of its parameter for a request's engine input.
        params: The name of its parameter for the request's `SamplingParams`.
        processor: Where an object of the class has the engine's input processor.
    """

    owner: type
    name: str
    prompt: str
    params: str
    processor: str


TARGETS = (
    Target(AsyncLLM, "generate", "prompt", "sampling_params", "input_processor"),
    Target(LLMEngine, "add_request", "prompt", "params", "input_processor"),
    # It calls `AsyncLLM.generate` only after a stream has begun.
    Target(
        OpenAIServingResponses,
        "_generate_with_builtin_tools",
        "engine_input",
        "sampling_params",
        "engine_client.input_processor",
    ),
)
EXTENSION_POINT = "request_checks"
"""A list of functions that vLLM calls with its input processor, a request's prompt and its parameters."""


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
    """Wraps the methods by which vLLM's engines are given requests, so that they call `check` first.

    If vLLM has a list of such checks (`patches/request-check.diff`), `check` is added to it.

    Raises:
        RuntimeError: A method is not the one that the wrapper was written for.
    """
    checks = getattr(InputProcessor, EXTENSION_POINT, None)
    if checks is not None:
        if check not in checks:
            checks.append(check)
        return
    for target in TARGETS:
        original = getattr(target.owner, target.name, None)
        if hasattr(original, "checks_choice"):
            continue
        needed = {"self", target.prompt, target.params}
        if original is None or not inspect.signature(original).parameters.keys() >= needed:
            raise unknown(f"{target.owner.__name__}.{target.name}")
        setattr(target.owner, target.name, _checked(original, target))


def _checked(original: Any, target: Target) -> Any:
    """A method that calls `check` before `original`."""
    signature, processor = inspect.signature(original), operator.attrgetter(target.processor)

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        given = signature.bind(self, *args, **options).arguments
        check(processor(self), given[target.prompt], given[target.params])
        return original(self, *args, **options)

    checked.checks_choice = True  # type: ignore[attr-defined]
    return checked
