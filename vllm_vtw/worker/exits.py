"""Dynamic exits: at every border gates decide whose visual tokens leave, and the rest of the step follows.

The step is planned as if nothing left. Where something does, the stages from there on are planned anew and
their attention metadata built again, in prefill steps only.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.gates import features, load_gates, margins
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy
from vllm_vtw.retention import Retention


class Gates(nn.Module):
    """A policy's gates on the device, in float32.

    Their weights are buffers, which vLLM keeps while an engine sleeps and does not look for in a checkpoint.

    Args:
        policy: Names them.
        hidden_size: Of the model.
        device: Where the model runs.

    Raises:
        ValueError: There is something wrong with their file.
    """

    def __init__(self, policy: Policy, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        assert policy.gate is not None
        layers = [stage.layer for stage in policy.stages]
        loaded = load_gates(policy.gate, layers, hidden_size)
        self.thresholds = policy.gate.thresholds
        self.gates = nn.ModuleList(_on_device(gate, device) for gate in loaded)

    def leave(self, stage: int, texts: Sequence[torch.Tensor]) -> list[bool]:
        """Whether the visual tokens of each prompt are gone from `stage` on.

        Args:
            stage: 1 or deeper.
            texts: For each prompt the states of its text behind the last picture, `(tokens, hidden_size)`.
        """
        of_prompts = torch.stack([features(text) for text in texts])
        found = margins(self.gates[stage - 1], of_prompts)
        # Ranks that differed in a last bit could decide differently.
        return (get_tp_group().broadcast(found) > self.thresholds[stage - 1]).tolist()


def _on_device(gate: nn.Sequential, device: torch.device) -> nn.Sequential:
    """The gate with buffers in place of its parameters."""
    for layer in gate.children():
        for name, weight in list(layer.named_parameters()):
            delattr(layer, name)
            layer.register_buffer(name, weight.detach().to(device), persistent=False)
    return gate


def blocks_left(
    kv_cache_config: KVCacheConfig, retentions: Sequence[Retention], num_tokens: int
) -> Iterator[tuple[int, int]]:
    """By KV-cache group of a stage past the first, how many blocks of a request are left to it.

    Args:
        kv_cache_config: The groups.
        retentions: Of the request, at every stage past the first.
        num_tokens: That it has so far.
    """
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec, StageSpec):
            yield index, -(-retentions[spec.stage - 1].count(num_tokens) // spec.block_size)
