# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a policy costs: the decoder's work and the KV memory that it takes, compared with stock vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.policy import Policy

STOCK = Policy(())
"""The policy that withdraws nothing, as stock vLLM."""


@dataclass(frozen=True)
class RequestTokens:
    """The numbers of a request's tokens, or their means over many requests.

    Attributes:
        visual: Visual tokens of the prompt.
        text: All other tokens of the prompt.
        output: Tokens of the answer.
    """

    visual: float
    text: float
    output: float


@dataclass(frozen=True)
class Price:
    """Computes what policies cost for one model and one kind of request.

    Attributes:
        num_layers: The number of the decoder's layers.
        layer_parameters: The number of parameters of one decoder layer that compute a token.
        attention_width: The number of attention heads times their size.
        request: The tokens of a request.
        work_weight: How much a share of the work counts in `cost`, relative to the same share of KV memory.
    """

    num_layers: int
    layer_parameters: int
    attention_width: int
    request: RequestTokens
    work_weight: float = 1.0

    def layer_flops(self, keep: float) -> float:
        """The floating-point operations that one layer needs for a prompt.

        They are counted as in the papers: two for each parameter and token, and attention between all pairs
        of tokens.

        Args:
            keep: The fraction of visual tokens that the layer gets.
        """
        tokens = keep * self.request.visual + self.request.text
        return 2 * self.layer_parameters * tokens + 4 * self.attention_width * tokens**2

    def prefill_flops(self, policy: Policy) -> float:
        """The floating-point operations that all decoder layers together need for a prompt."""
        segments = zip(policy.keeps, policy.segments(self.num_layers), strict=True)
        return sum(len(layers) * self.layer_flops(keep) for keep, layers in segments)

    def layer_held(self, keep: float) -> float:
        """The number of tokens of a request, prompt and answer, that one layer holds in the KV cache.

        Args:
            keep: The fraction of visual tokens that the layer holds.
        """
        return keep * self.request.visual + self.request.text + self.request.output

    def flops_share(self, policy: Policy) -> float:
        """The policy's `prefill_flops` as a share of stock vLLM's."""
        return self.prefill_flops(policy) / self.prefill_flops(STOCK)

    def kv_share(self, policy: Policy) -> float:
        """The KV memory of a request as a share of stock vLLM's.

        Memory that KV-cache groups waste is included. Rounding up to whole blocks is not.
        """
        return self._kv_share(policy, policy.keeps)

    def kv_share_at_exit(self, policy: Policy, exit_stage: int | None) -> float:
        """The KV memory of a request that chooses where its visual tokens leave, as a share of stock vLLM's.

        Memory that KV-cache groups waste is included. Rounding up to whole blocks is not.

        Args:
            policy: A policy all of whose stages keep no visual tokens.
            exit_stage: The first stage without the request's visual tokens. None if they stay.
        """
        stages = range(len(policy.keeps))
        return self._kv_share(policy, [float(exit_stage is None or stage < exit_stage) for stage in stages])

    def _kv_share(self, policy: Policy, keeps: Sequence[float]) -> float:
        groups = LayerGroups.of(policy, self.num_layers)
        held = [self.layer_held(keep) for keep in keeps]
        return groups.layer_tokens(held) / (self.num_layers * self.layer_held(1))

    def cost(self, policy: Policy) -> float:
        """The weighted sum of `flops_share` and `kv_share`, which searches minimize."""
        return self.work_weight * self.flops_share(policy) + self.kv_share(policy)
