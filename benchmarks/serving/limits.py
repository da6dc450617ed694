"""What withdrawal can win at most, from the numbers of tokens and where stock vLLM's time goes."""

from dataclasses import dataclass, replace

from vllm_vtw.search.price import Request, prefill_flops


@dataclass(frozen=True)
class Limits:
    """At most so many times stock vLLM's.

    Attributes:
        requests: Requests in the same KV memory, where memory is what there is too little of.
        prefill: Prompts that the decoder's layers compute in a second.
        speed: Requests answered in a second: `prefill` for the part of stock's time that goes into prompts,
            `requests` for that of decoding. In full batches a step takes the same time and answers as many
            more; where memory suffices for all, only the KV cache's part of a step shrinks, which is less.
    """

    requests: float
    prefill: float
    speed: float


def limits(
    request: Request,
    *,
    layer: int,
    num_layers: int,
    hidden_size: int,
    layer_parameters: int,
    prefill_share: float,
) -> Limits:
    """The limits for requests of one kind, K and the part of stock's time that computes prompts.

    Blocks, padding, the vision tower and sampling are left out: what they cost, what is reached lacks.

    Args:
        request: Its tokens.
        layer: K.
        num_layers: L.
        hidden_size: Of the decoder.
        layer_parameters: Of a layer of the decoder.
        prefill_share: From 0 to 1.
    """
    # A request holds its whole answer only at its end: over its decode steps, half of it.
    middle = replace(request, output=request.output / 2)
    all_tokens = middle.visual + middle.text + middle.output
    text_tokens = middle.text + middle.output
    requests = num_layers * all_tokens / (layer * all_tokens + (num_layers - layer) * text_tokens)
    stock, vtw = (
        prefill_flops(k, num_layers, request, layer_parameters, hidden_size) for k in (num_layers, layer)
    )
    prefill = stock / vtw
    return Limits(requests, prefill, 1 / (prefill_share / prefill + (1 - prefill_share) / requests))
