# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Refuses requests that a policy cannot serve correctly, before they are queued.

vLLM passes each prompt to the model's multimodal processor before it queues the request. An exception of the
processor ends the request with HTTP 400, or is raised by `LLM.generate`.
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
    """The properties of a prompt's image or video that retention depends on.

    They have the names that vLLM's `MultiModalFeatureSpec` gives them.
    """

    modality: str
    mm_position: PlaceholderRange


class RecordingCache:
    """A processor's cache that records which items are added to it.

    Args:
        cache: vLLM's cache, which does everything else.

    Attributes:
        hashes: The hashes of the added items.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.hashes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_and_update_item(self, item: Any, item_hash: str) -> Any:
        """Calls vLLM's method. The processor passes the item if the cache lacks it, and None otherwise."""
        if item is not None:
            self.hashes.append(item_hash)
        return self._cache.get_and_update_item(item, item_hash)


@functools.cache
def admission_processor(processor: Any) -> type[BaseMultiModalProcessor]:
    """A subclass of a model's processor that refuses prompts which the policy cannot serve.

    Args:
        processor: The class of the model's processor.
    """

    class AdmissionProcessor(processor):
        def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
            """Processes a prompt as vLLM does, and marks it if beam search has to be refused for it.

            Raises:
                ValueError: The policy computes the prompt in one step, for which it is too long.
            """
            admission: Admission = getattr(self.info.ctx.model_config, ADMISSION)
            added = RecordingCache(inputs.cache)
            if inputs.cache is not None:
                inputs = dataclasses.replace(inputs, cache=added)
            processed = super().apply(inputs, *args, **kwargs)
            length = len(processed["prompt_token_ids"])
            # The KV block size may not be known yet. Prompts whose retention depends on their end with whole
            # blocks are among those whose retention depends on it with `align_to=1`.
            retentions = request_retentions(
                admission.policy,
                list(mm_features(processed["mm_placeholders"])),
                length,
                align_to=1,
                bridge=admission.bridge,
            )
            one_step = retentions[0].one_step
            if one_step is not None and one_step.stop - one_step.start > admission.max_step_tokens:
                # This cache lists what the engine's cache holds. The engine will not get these items now.
                for item_hash in added.hashes:
                    inputs.cache.invalidate(item_hash)
                needed = one_step.stop - one_step.start
                raise ValueError(
                    f"The prompt has {needed} tokens from its first image on. The policy of --model-impl vtw "
                    f"computes them in one step, and a step has room for {admission.max_step_tokens}: raise "
                    f"--max-num-batched-tokens to {needed} (to --max-model-len for prompts of any length), "
                    "or send a shorter prompt."
                )
            if any(retention.shareable < length for retention in retentions):
                beam_search.refuse(processed)
            return processed

    assert issubclass(AdmissionProcessor, BaseMultiModalProcessor)
    return AdmissionProcessor


def mm_features(placeholders: Mapping[str, list[PlaceholderRange]]) -> list[MultiModalFeature]:
    """The multimodal items of a prompt, as `request_retentions` takes them.

    Args:
        placeholders: By modality, the places of the items in the prompt.
    """
    return [
        MultiModalFeature(modality, place) for modality, places in placeholders.items() for place in places
    ]


def with_admission_check(
    factory: Callable[..., BaseMultiModalProcessor],
) -> Callable[..., BaseMultiModalProcessor]:
    """A processor factory whose processors refuse what the policy cannot serve.

    If nothing is withdrawn, the processor is that of `factory`.

    Args:
        factory: The model's own processor factory.
    """

    @functools.wraps(factory)
    def make(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor:
        processor = factory(info, dummy_inputs)
        if hasattr(info.ctx.model_config, ADMISSION):
            beam_search.install()
            vllm_processor: Any = type(processor)
            processor.__class__ = admission_processor(vllm_processor)
        return processor

    return make
