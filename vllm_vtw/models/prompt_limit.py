"""Refuses a prompt that no step could take from its first picture to its end, where policies need that.

vLLM shows prompts to the model's processor before they are queued: what it raises is the request's error.
"""

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_vtw.config import LONGEST_STEP
from vllm_vtw.retention import VISUAL


@functools.cache
def _limited(processor: Any) -> type[BaseMultiModalProcessor]:
    class LimitedProcessor(processor):
        def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
            """vLLM's input.

            Raises:
                ValueError: It is too long.
            """
            processed = super().apply(inputs, *args, **kwargs)
            placeholders = processed["mm_placeholders"]
            starts = [place.offset for kind in VISUAL for place in placeholders.get(kind, ())]
            length, most = (
                len(processed["prompt_token_ids"]),
                getattr(self.info.ctx.model_config, LONGEST_STEP),
            )
            if not starts or length - min(starts) <= most:
                return processed
            if inputs.cache is not None:
                # It takes the engine to have what it has seen; now the engine will not.
                for identifier in chain.from_iterable(processed["mm_hashes"].values()):
                    inputs.cache.invalidate(identifier)
            needed = length - min(starts)
            raise ValueError(
                f"The prompt has {needed} tokens from its first image on. The policy of --model-impl vtw "
                f"takes them in one step, and a step takes {most}: raise --max-num-batched-tokens to {needed}"
                " or, for any prompt, to --max-model-len, or send less."
            )

    assert issubclass(LimitedProcessor, BaseMultiModalProcessor)
    return LimitedProcessor


def limited(factory: Callable[..., BaseMultiModalProcessor]) -> Callable[..., BaseMultiModalProcessor]:
    """What makes a model's processor, with the limit where the configuration has one."""

    @functools.wraps(factory)
    def make(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor:
        processor = factory(info, dummy_inputs)
        if hasattr(info.ctx.model_config, LONGEST_STEP):
            of_vllm: Any = type(processor)
            processor.__class__ = _limited(of_vllm)
        return processor

    return make
