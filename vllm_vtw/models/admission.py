# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Refuses requests that a policy cannot serve correctly, before they are queued.

The refused request ends with HTTP 400, or `LLM.generate` raises the error.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple

import numpy as np
from vllm.multimodal.inputs import PlaceholderRange

from vllm_vtw.choice import LAYER, TASK, Choice, choice_of
from vllm_vtw.config import Admission
from vllm_vtw.retention import Retention, image_key, request_retentions

NO_CHOICE = Choice()
NOTHING = np.empty(0, dtype=np.int32)


class MultiModalFeature(NamedTuple):
    """The properties of a prompt's image or video that retention depends on.

    They have the names that vLLM's `MultiModalFeatureSpec` gives them.
    """

    modality: str
    mm_position: PlaceholderRange
    mm_hash: str
    identifier: str


def mm_features(prompt: Mapping[str, Any]) -> list[MultiModalFeature]:
    """The multimodal items of a prompt, as `request_retentions` takes them.

    Args:
        prompt: The engine input of a multimodal prompt.
    """
    return [
        MultiModalFeature(modality, place, item_hash, item_hash)
        for modality, places in prompt["mm_placeholders"].items()
        for place, item_hash in zip(places, prompt["mm_hashes"][modality], strict=True)
    ]


def prompt_retentions(
    admission: Admission, prompt: Mapping[str, Any], choice: Choice = NO_CHOICE
) -> tuple[Retention, ...]:
    """What the stages past the first retain of a prompt, if withdrawal goes by tokens and not by blocks.

    Under a ranking by features, it is not known here which tokens of images stay, and none does.

    Args:
        admission: What the policy serves.
        prompt: The engine input of a multimodal prompt.
        choice: What the request chose.
    """
    features = mm_features(prompt)
    return request_retentions(
        admission.policy,
        features,
        len(prompt["prompt_token_ids"]),
        align_to=1,
        bridge=admission.bridge,
        layer=choice.layer,
        keep=choice.keep,
        orders={image_key(feature): NOTHING for feature in features},
    )


def check_request(admission: Admission, prompt: Any, params: Any) -> None:
    """Refuses a request that the policy cannot serve.

    Args:
        admission: What the policy serves.
        prompt: The request's engine input, or the pieces of one that come in the course of time.
        params: Its `SamplingParams`.

    Raises:
        ValueError: Its prompt comes in pieces. It chose a layer, task or share that is not offered. Another
            engine has computed its prompt with another layer. Or its policy computes the prompt in one step,
            for which it is too long.
    """
    if isinstance(prompt, AsyncGenerator):
        raise ValueError("Streaming input would change what was withdrawn: send the whole prompt at once.")
    choice = choice_of(admission.policy, admission.num_layers, params)
    _check_prefill(admission, choice, params)
    if not admission.policy.is_dynamic:
        return  # only these policies compute prompts in one step
    if not isinstance(prompt, Mapping) or prompt.get("type") != "multimodal":
        return
    retentions = prompt_retentions(admission, prompt, choice)
    one_step = retentions[0].one_step if retentions else None
    if one_step is not None and one_step.stop - one_step.start > admission.max_step_tokens:
        needed = one_step.stop - one_step.start
        raise ValueError(
            f"The prompt has {needed} tokens from its first image on. The policy of --model-impl vtw "
            f"computes them in one step, and a step has room for {admission.max_step_tokens}: raise "
            f"--max-num-batched-tokens to {needed} (to --max-model-len for prompts of any length), "
            "or send a shorter prompt."
        )


def _check_prefill(admission: Admission, choice: Choice, params: Any) -> None:
    """Refuses a request whose prompt another engine has computed with another layer."""
    transfer = (getattr(params, "extra_args", None) or {}).get("kv_transfer_params") or {}
    if not transfer.get("do_remote_prefill"):
        return
    layer = choice.layer or admission.policy.default_layer or admission.num_layers
    if transfer.get(LAYER) != layer:
        left = f"at layer {transfer[LAYER]}" if LAYER in transfer else "at no layer that is known"
        raise ValueError(
            f"The engine that computed the prompt withdrew its visual tokens {left}, and this request's "
            f"leave at layer {layer}: send the same {LAYER!r} or {TASK!r} to both, and kv_transfer_params as "
            "the first one returned them."
        )


def forget_items(prompt: Any, cache: Any) -> None:
    """Removes the items of a refused prompt from the processor's cache, if the prompt added them.

    This cache lists what the engine's cache holds. The engine will not get these items now.

    Args:
        prompt: The request's engine input.
        cache: vLLM's cache of processed items. None if there is none.
    """
    if cache is None or not isinstance(prompt, Mapping) or prompt.get("type") != "multimodal":
        return
    for modality, hashes in prompt["mm_hashes"].items():
        # An item that the cache had before is None here.
        for item_hash, item in zip(hashes, prompt["mm_kwargs"][modality], strict=True):
            if item is not None:
                cache.invalidate(item_hash)
