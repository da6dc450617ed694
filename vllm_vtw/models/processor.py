# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The multimodal processor of a served model: vLLM's, which also marks prompts that refuse beam search."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_vtw.config import ADMISSION
from vllm_vtw.models import beam_search, request_check
from vllm_vtw.models.admission import prompt_retentions


@functools.cache
def marking_processor(processor: Any) -> type[BaseMultiModalProcessor]:
    """A subclass of a model's processor that marks prompts for which beam search has to be refused.

    Args:
        processor: The class of the model's processor.
    """

    class MarkingProcessor(processor):
        def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
            """Processes a prompt as vLLM does, and marks it if beam search has to be refused for it."""
            processed = super().apply(inputs, *args, **kwargs)
            # The KV block size may not be known yet. Prompts whose retention depends on their end with whole
            # blocks are among those whose retention depends on it with `align_to=1`.
            admission = getattr(self.info.ctx.model_config, ADMISSION)
            length = len(processed["prompt_token_ids"])
            if any(retention.shareable < length for retention in prompt_retentions(admission, processed)):
                beam_search.refuse(processed)
            return processed

    assert issubclass(MarkingProcessor, BaseMultiModalProcessor)
    return MarkingProcessor


def with_request_check(
    factory: Callable[..., BaseMultiModalProcessor],
) -> Callable[..., BaseMultiModalProcessor]:
    """A processor factory that also makes vLLM refuse what the policy cannot serve.

    Args:
        factory: The model's own processor factory.
    """

    @functools.wraps(factory)
    def make(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor:
        processor = factory(info, dummy_inputs)
        if hasattr(info.ctx.model_config, ADMISSION):
            beam_search.install()
            request_check.install()
            vllm_processor: Any = type(processor)
            processor.__class__ = marking_processor(vllm_processor)
        return processor

    return make
