"""Refuses what a policy cannot serve right before it is queued, with the reason.

vLLM shows prompts to the model's processor before they are queued. What the processor raises is the request's
error: HTTP 400, or an exception of `LLM.generate`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_vtw.config import ADMISSION, Admission
from vllm_vtw.models import beam_search
from vllm_vtw.retention import request_retentions


class MultiModalFeature(NamedTuple):
    """An image or video of a prompt, as much of it as retention depends on."""

    modality: str
    mm_position: PlaceholderRange


class RecordingCache:
    """A processor's cache, which notes what is added to it.

    Args:
        cache: vLLM's.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.hashes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_and_update_item(self, item: Any, item_hash: str) -> Any:
        """vLLM's. It gets the item where the cache lacks it, and None otherwise."""
        if item is not None:
            self.hashes.append(item_hash)
        return self._cache.get_and_update_item(item, item_hash)


@functools.cache
def admission_processor(processor: Any) -> type[BaseMultiModalProcessor]:
    """Subclasses a model's processor so that it refuses prompts that no step could take."""

    class AdmissionProcessor(processor):
        def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
            """vLLM's input.

            Raises:
                ValueError: It is too long.
            """
            admission: Admission = getattr(self.info.ctx.model_config, ADMISSION)
            added = RecordingCache(inputs.cache)
            if inputs.cache is not None:
                inputs = dataclasses.replace(inputs, cache=added)
            processed = super().apply(inputs, *args, **kwargs)
            length = len(processed["prompt_token_ids"])
            # Whatever the KV blocks are: their size may not be known yet.
            retentions = request_retentions(
                admission.policy, list(mm_features(processed["mm_placeholders"])), length, align_to=1
            )
            one_step = retentions[0].one_step
            if one_step is not None and one_step.stop - one_step.start > admission.max_step_tokens:
                # The cache takes the engine to have what was added; now the engine will not.
                for item_hash in added.hashes:
                    inputs.cache.invalidate(item_hash)
                needed = one_step.stop - one_step.start
                raise ValueError(
                    f"The prompt has {needed} tokens from its first image on. The policy of --model-impl vtw "
                    f"takes them in one step, and a step takes {admission.max_step_tokens}: raise "
                    f"--max-num-batched-tokens to {needed} or, for any prompt, to --max-model-len, or send "
                    "less."
                )
            if any(retention.shareable < length for retention in retentions):
                beam_search.refuse(processed)
            return processed

    assert issubclass(AdmissionProcessor, BaseMultiModalProcessor)
    return AdmissionProcessor


def mm_features(placeholders: Mapping[str, list[PlaceholderRange]]) -> list[MultiModalFeature]:
    """All images and videos of a prompt, given the places of each kind."""
    return [
        MultiModalFeature(modality, place) for modality, places in placeholders.items() for place in places
    ]


def with_admission_check(
    factory: Callable[..., BaseMultiModalProcessor],
) -> Callable[..., BaseMultiModalProcessor]:
    """What makes a model's processor, with the limits where the configuration withdraws anything."""

    @functools.wraps(factory)
    def make(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor:
        processor = factory(info, dummy_inputs)
        if hasattr(info.ctx.model_config, ADMISSION):
            beam_search.install()
            of_vllm: Any = type(processor)
            processor.__class__ = admission_processor(of_vllm)
        return processor

    return make
