"""What a policy leaves to be paid: of stock's KV memory and of the decoder's work."""

from dataclasses import dataclass

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.policy import Policy

STOCK = Policy(())


@dataclass(frozen=True)
class RequestTokens:
    """A request's tokens, which may be means over many."""

    visual: float
    text: float
    output: float


@dataclass(frozen=True)
class Price:
    """What policies take of a decoder's work and of the KV memory.

    Attributes:
        num_layers: Of the decoder.
        layer_parameters: Of one of them.
        hidden_size: Of their states.
        request: A request's tokens.
        work_weight: What a share of the work costs, where the same share of the memory costs 1.
    """

    num_layers: int
    layer_parameters: int
    hidden_size: int
    request: RequestTokens
    work_weight: float = 1.0

    def layer_flops(self, keep: float) -> float:
        """Floating-point operations over a prompt, of a layer that gets the fraction `keep` of visual tokens.

        As in the papers: two for every weight and token, and attention over all pairs of tokens.
        """
        tokens = keep * self.request.visual + self.request.text
        return 2 * self.layer_parameters * tokens + 4 * self.hidden_size * tokens**2

    def prefill_flops(self, policy: Policy) -> float:
        """Floating-point operations of the decoder's layers over a prompt."""
        segments = zip(policy.keeps, policy.segments(self.num_layers), strict=True)
        return sum(len(layers) * self.layer_flops(keep) for keep, layers in segments)

    def layer_held(self, keep: float) -> float:
        """Tokens that a layer holds of a whole request, with the fraction `keep` of visual tokens."""
        return keep * self.request.visual + self.request.text + self.request.output

    def flops_share(self, policy: Policy) -> float:
        """Of stock's `prefill_flops`."""
        return self.prefill_flops(policy) / self.prefill_flops(STOCK)

    def kv_share(self, policy: Policy) -> float:
        """Of stock's KV memory for a request, the padding of KV-cache groups included, blocks not."""
        groups = LayerGroups.of(policy, self.num_layers)
        held = sum(self.layer_held(policy.keeps[stage]) for stage in groups.stages)
        return groups.width * held / (self.num_layers * self.layer_held(1))

    def cost(self, policy: Policy) -> float:
        """Of both shares."""
        return self.work_weight * self.flops_share(policy) + self.kv_share(policy)
