# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What withdrawal can win at most, from the numbers of tokens and where stock vLLM's time goes."""

from dataclasses import dataclass, replace

from benchmarks.serving.models import Llava
from vllm_vtw.policy import Policy
from vllm_vtw.search.price import RequestTokens


@dataclass(frozen=True)
class Limits:
    """At most so many times stock vLLM's.

    Attributes:
        requests: Requests at once, where memory is what there is too little of.
        prefill: Prompts that the decoder's layers compute in a second.
        decode: Tokens decoded in a second.
        speed: Requests answered in a second: `prefill` and `decode`, each for its part of stock's time.
    """

    requests: float
    prefill: float
    decode: float
    speed: float


def limits(
    request: RequestTokens,
    model: Llava,
    policy: Policy,
    prefill_share: float,
    running: float,
    short_of_memory: bool,
) -> Limits:
    """The limits for requests of one kind and a policy.

    Short of memory, a step of as many more requests takes the same time at best: it reads the weights and a
    full KV cache. With memory for all, it reads the weights as before and less of the cache. Not counted, and
    so missing from what is reached: blocks that are not full, the vision tower, sampling, and the computation
    in decode steps.

    Args:
        request: Its tokens.
        model: Its decoder's shape.
        policy: What is withdrawn.
        prefill_share: The part of stock's time that computes prompts, from 0 to 1.
        running: Requests at once in stock vLLM.
        short_of_memory: Whether stock vLLM had requests wait for KV memory.
    """
    # A request holds its whole answer only at its end: over its decode steps, half of it.
    middle = replace(request, output=request.output / 2)
    share = model.price(middle).kv_share(policy)
    decode = 1 / share
    if not short_of_memory:
        weights = model.layers * model.layer_parameters + model.vocab * model.hidden
        cache = running * (middle.visual + middle.text + middle.output) * model.layers * 2 * model.hidden
        decode = (weights + cache) / (weights + share * cache)
    prefill = 1 / model.price(request).flops_share(policy)
    return Limits(1 / share, prefill, decode, 1 / (prefill_share / prefill + (1 - prefill_share) / decode))
