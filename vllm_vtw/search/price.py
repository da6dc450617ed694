"""What a withdrawal layer leaves to be paid: shares of stock's KV memory and of the decoder's work."""

from dataclasses import dataclass

from vllm_vtw.capacity import Groups
from vllm_vtw.policy import Policy


@dataclass(frozen=True)
class Request:
    """A request's tokens, which may be means over many."""

    visual: float
    text: float
    output: float


def kv_share(layer: int, num_layers: int, request: Request) -> float:
    """KV memory with withdrawal over that without, the padding of KV-cache groups included, blocks not."""
    groups = Groups.of(Policy.withdraw_at(layer, num_layers), num_layers)
    text = request.text + request.output
    held = (request.visual + text, text)
    return groups.width * sum(held[stage] for stage in groups.stages) / (num_layers * held[0])


def prefill_flops(
    layer: int, num_layers: int, request: Request, layer_parameters: int, hidden_size: int
) -> float:
    """Floating-point operations of the decoder's layers over a prompt.

    As in the papers: two for every weight and token, and attention over all pairs of tokens.
    """

    def of_layer(tokens: float) -> float:
        return 2 * layer_parameters * tokens + 4 * hidden_size * tokens**2

    return layer * of_layer(request.visual + request.text) + (num_layers - layer) * of_layer(request.text)
