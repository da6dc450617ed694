"""A decoder cut into one segment a stage: each computes the tokens that its stage retains."""

from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from vllm_vtw.policy import Policy
from vllm_vtw.worker.backend import StageAttention
from vllm_vtw.worker.step import CurrentStep


class StagedDecoder:
    """Runs the layers of a vLLM text model, withdrawing tokens between its segments.

    Not an `nn.Module`: the layers stay registered where the text model has them, under their own names.

    Args:
        text_model: vLLM's `LlamaModel` or a model of the same shape: `embed_input_ids`, `layers`, `norm`.
        policy: Where the segments begin.
        step: What each step retains.
    """

    def __init__(self, text_model: Any, policy: Policy, step: CurrentStep) -> None:
        self.embed_input_ids = text_model.embed_input_ids
        self.norm: nn.Module = text_model.norm
        self.step = step
        layers = list(text_model.layers)
        self.segments = [[layers[i] for i in segment] for segment in policy.segments(len(layers))]
        for stage, segment in enumerate(self.segments[1:], start=1):
            for layer in segment:
                StageAttention.adopt(layer.self_attn.attn, stage, step)

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """The final hidden states of the whole batch, shape `(tokens, hidden_size)`.

        A withdrawn token's row is its state where it left, after the final norm. Nothing is sampled from it.

        Args:
            input_ids: Token ids, shape `(tokens,)`; read only where there are no embeddings.
            positions: Position ids in the prompts as they came, shape `(tokens,)`.
            inputs_embeds: Embeddings of text and pictures, shape `(tokens, hidden_size)`.
        """
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: torch.Tensor | None = None
        left_behind = []
        for segment, gather in zip(self.segments, (None, *self._gathers()), strict=True):
            if gather is not None:
                assert residual is not None
                left_behind.append((gather, hidden, residual))
                hidden, residual, positions = hidden[gather], residual[gather], positions[gather]
            if len(hidden) == 0:
                continue  # a chunk of nothing but withdrawn tokens
            for layer in segment:
                hidden, residual = layer(positions, hidden, residual)
        for gather, whole_hidden, whole_residual in reversed(left_behind):
            hidden = whole_hidden.index_copy_(0, gather, hidden)
            residual = whole_residual.index_copy_(0, gather, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def _gathers(self) -> list[torch.Tensor | None]:
        """Each stage's tokens among those of the stage before. Points the stages' layers at their slots."""
        context = get_forward_context()
        if context.attn_metadata is None:  # a profiling run
            return [None] * self.step.num_stages
        context.slot_mapping.update(self.step.slot_mappings)
        return [None if stage is None else stage.gather for stage in self.step.stages]
