# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Computes what withdrawal can win at most, from the numbers of tokens and how stock vLLM spends its time."""

from dataclasses import dataclass, replace

from benchmarks.serving.models import Model
from vllm_vtw.policy import Policy
from vllm_vtw.search.price import RequestTokens


@dataclass(frozen=True)
class Limits:
    """Upper bounds of what the plugin can reach, as multiples of what stock vLLM reaches.

    Attributes:
        requests: The number of requests that run at once, if KV memory limits it.
        prefill: The prompts that the decoder's layers compute per second.
        decode: The tokens that are decoded per second.
        speed: The requests that are answered per second. It combines `prefill` and `decode`, each for its
            fraction of stock vLLM's time.
    """

    requests: float
    prefill: float
    decode: float
    speed: float


def limits(
    request: RequestTokens,
    model: Model,
    policy: Policy,
    prefill_share: float,
    running: float,
    short_of_memory: bool,
) -> Limits:
    """The limits for requests of one kind under a policy.

    If KV memory is short, more requests run at once. At best, a decode step of more requests takes as long as
    before, because it reads the weights and a full KV cache in both cases. If there is memory for all
    requests, a decode step reads the same weights and less of the KV cache.

    The limits leave out blocks that are not full, the vision tower, sampling, and the computation in decode
    steps. What is reached is therefore less.

    Args:
        request: The numbers of tokens of a request.
        model: The model's shape.
        policy: The plugin's policy.
        prefill_share: The fraction of stock vLLM's time in which it computes prompts.
        running: The number of requests that run at once in stock vLLM.
        short_of_memory: Whether requests wait for KV memory in stock vLLM.
    """
    # A request holds its whole answer only in its last step. Over its decode steps, it holds half of it.
    middle = replace(request, output=request.output / 2)
    share = model.price(middle).kv_share(policy)
    decode = 1 / share
    if not short_of_memory:
        # Of many tokens, some are for every expert.
        weights = model.layers * model.layer_parameters(model.experts) + model.vocab * model.hidden
        cache = running * (middle.visual + middle.text + middle.output) * model.layers * 2 * model.kv_width
        decode = (weights + cache) / (weights + share * cache)
    prefill = 1 / model.price(request).flops_share(policy)
    return Limits(1 / share, prefill, decode, 1 / (prefill_share / prefill + (1 - prefill_share) / decode))
