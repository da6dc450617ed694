# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Dynamic exits (DyVTE, arXiv 2411.19628) in the worker: the gates on the device.

At the border of every stage, gates decide which prompts lose their visual tokens. A step is planned as if no
token left. Where gates decide otherwise, the stages from there on are planned again and their attention
metadata are built again; see `CurrentStep.ask_gates`. This happens only in steps that compute prompts.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.gates import gate_features, leave_margins, load_gates
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy
from vllm_vtw.retention import Retention


class Gates(nn.Module):
    """A policy's gates on the device, in float32.

    Their weights are buffers, not parameters: vLLM keeps buffers while an engine sleeps, and does not look
    for them in the checkpoint.

    Args:
        policy: A policy with gates.
        hidden_size: The model's hidden size.
        device: Where the model runs.

    Raises:
        ValueError: `load_gates` refused the gates file.
    """

    def __init__(self, policy: Policy, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        assert policy.gate is not None
        layers = [stage.layer for stage in policy.stages]
        loaded = load_gates(policy.gate, layers, hidden_size)
        self.thresholds = policy.gate.thresholds
        self.gates = nn.ModuleList(_on_device(gate, device) for gate in loaded)

    def leave(self, stage: int, texts: Sequence[torch.Tensor]) -> list[bool]:
        """Whether each prompt loses its visual tokens before a stage.

        Args:
            stage: 1 or deeper.
            texts: For each prompt, the states of its text after the last image, shape
                `(tokens, hidden_size)`.
        """
        features = torch.stack([gate_features(text) for text in texts])
        margins = leave_margins(self.gates[stage - 1], features)
        # All tensor-parallel ranks use the first one's numbers. Their own could differ in the last bit, and
        # the decisions with them.
        return (get_tp_group().broadcast(margins) > self.thresholds[stage - 1]).tolist()


def _on_device(gate: nn.Sequential, device: torch.device) -> nn.Sequential:
    """The gate with buffers in place of its parameters."""
    for layer in gate.children():
        for name, weight in list(layer.named_parameters()):
            delattr(layer, name)
            layer.register_buffer(name, weight.detach().to(device), persistent=False)
    return gate


def blocks_after_exit(
    kv_cache_config: KVCacheConfig, retentions: Sequence[Retention], num_tokens: int
) -> Iterator[tuple[int, int]]:
    """How many blocks a request still holds in each KV-cache group of the stages past the first.

    Args:
        kv_cache_config: The KV-cache groups.
        retentions: The request's retention in every stage past the first, after its exit.
        num_tokens: Tokens of the request so far.

    Yields:
        The index of a group, and the number of blocks.
    """
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec, StageSpec) and spec.stage > 0:
            yield index, -(-retentions[spec.stage - 1].count(num_tokens) // spec.tokens_per_block)
