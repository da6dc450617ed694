"""A decoder cut into one segment a stage: each computes the tokens that its stage retains."""

from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import BatchDescriptor, get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors

from vllm_vtw.models.graph_inputs import GraphInputs
from vllm_vtw.models.received import EXIT_STATES, received_rows
from vllm_vtw.models.segment import Segment, compiled_segment
from vllm_vtw.policy import Policy
from vllm_vtw.worker.backend import StageAttention
from vllm_vtw.worker.exits import Gates
from vllm_vtw.worker.ranking import rank_behind
from vllm_vtw.worker.step import CurrentStep, StageStep


class StagedDecoder:
    """Runs a pipeline rank's layers of a vLLM text model, withdrawing tokens between its segments.

    Not an `nn.Module`: the layers stay registered where the text model has them, under their own names.

    Args:
        vllm_config: vLLM's configuration.
        text_model: vLLM's `LlamaModel` or a model of the same shape: `embed_input_ids`, `layers`,
            `start_layer`, `end_layer`, `norm`.
        policy: Where the segments begin.
        step: What each step retains.
    """

    def __init__(self, vllm_config: VllmConfig, text_model: Any, policy: Policy, step: CurrentStep) -> None:
        self.text_model = text_model
        self.step = step
        self.is_last_rank = get_pp_group().is_last_rank
        start, end = text_model.start_layer, text_model.end_layer
        borders = [stage.layer for stage in policy.stages]
        self.first_stage = bisect_right(borders, start)
        self.next_stage = bisect_right(borders, end) if not self.is_last_rank else len(borders)
        """The stage whose tokens the next rank expects; on the last rank, the last."""
        self.segments: dict[int, Segment] = {}
        for stage, layers in enumerate(policy.segments(len(text_model.layers))):
            own = [text_model.layers[i] for i in layers if start <= i < end]
            if not own:
                continue
            is_last = self.is_last_rank and layers.stop == end
            norm = text_model.norm if is_last else None
            self.segments[stage] = compiled_segment(vllm_config, stage, own, norm)
            if stage > 0:
                for layer in own:
                    StageAttention.adopt(layer.self_attn.attn, stage, policy.keeps[stage], step)
        if policy.ranking is not None:
            for stage, border in enumerate(borders, 1):
                rank_behind(text_model.layers[border - 1].self_attn.attn, stage, step)
        if policy.gate is not None:
            step.gates = Gates(policy, vllm_config.model_config.get_hidden_size(), step.device)
        self.graph_inputs = GraphInputs(vllm_config, step.device)

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        received: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        """The final hidden states of the whole batch, shape `(tokens, hidden_size)`.

        Before the last pipeline rank: the states of the tokens that the next rank computes.

        A withdrawn token's row is its state where it left, after the final norm, in steps where that is
        read, and zero otherwise. Nothing is sampled from it.

        Args:
            input_ids: Token ids, shape `(tokens,)`; read only where there are no embeddings.
            positions: Position ids in the prompts as they came, shape `(tokens,)`.
            received: What the rank before returned, in at least as many rows.
            inputs_embeds: Embeddings of text and pictures, shape `(tokens, hidden_size)`.
        """
        # Where vLLM measures memory, or keeps an idle rank in step, there is no batch.
        is_dummy = get_forward_context().attn_metadata is None
        steps = self._steps(is_dummy)
        residual: torch.Tensor | None = None
        exit_states: torch.Tensor | None = None
        if received is None:
            hidden = self.text_model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            kept = _kept(steps[self.first_stage])
            rows = len(positions) if kept is None else len(kept)
            hidden, residual = (received_rows(received, key, rows) for key in ("hidden_states", "residual"))
            if kept is not None and self.step.prompt_logprobs:
                exit_states = received_rows(received, EXIT_STATES, len(positions))

        for stage in range(self.first_stage, self.next_stage + 1):
            if stage > self.first_stage and self.step.asked and not is_dummy:
                assert residual is not None
                get_forward_context().attn_metadata.update(self.step.decide(stage, hidden, residual))
                steps = self._steps(is_dummy)
            step = steps[stage]
            if stage > self.first_stage and step is not None and step.gather is not None:
                assert residual is not None
                if self.step.prompt_logprobs:
                    exit_states = _noted(exit_states, _kept(steps[stage - 1]), hidden + residual)
                hidden, residual = hidden[step.gather], residual[step.gather]
            if stage in self.segments:
                hidden, residual = self._run(stage, step, positions, hidden, residual)

        if not self.is_last_rank:
            assert residual is not None
            if exit_states is None:
                exit_states = hidden.new_empty(0, hidden.shape[1])
            return IntermediateTensors(
                {"hidden_states": hidden, "residual": residual, EXIT_STATES: exit_states}
            )
        kept = _kept(steps[self.next_stage])
        if kept is None:
            return hidden
        if exit_states is None:
            whole = hidden.new_zeros(len(positions), hidden.shape[1])
        else:
            whole = self.text_model.norm(exit_states)
        return whole.index_copy_(0, kept, hidden)

    def _steps(self, is_dummy: bool) -> tuple[StageStep | None, ...]:
        """By stage, stage 0 included; None for what computes everything."""
        return (None, *((None,) * self.step.num_stages if is_dummy else self.step.stages))

    def _run(
        self,
        stage: int,
        step: StageStep | None,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs one segment, a CUDA graph of its own token count where there is one."""
        segment, context = self.segments[stage], get_forward_context()
        if stage == 0:
            return segment(positions, hidden, residual)
        rows = len(hidden)
        if rows == 0:
            return hidden, residual  # a chunk of nothing but withdrawn tokens
        assert residual is not None
        piecewise = context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        kept = _kept(step)
        size = rows if piecewise else None
        if kept is not None:
            # A batch too large for a graph may have few enough tokens left.
            if piecewise or self.graph_inputs.size(len(positions)) is None:
                size = self.graph_inputs.size(rows)
            positions = positions[kept]
        if size is not None:
            positions, hidden, residual = self.graph_inputs.write(size, positions, hidden, residual)
            context = replace(
                context,
                cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
                batch_descriptor=BatchDescriptor(num_tokens=size),
            )
        if context.attn_metadata is not None:
            slots = {name: self.step.slots[name].view(len(hidden)) for name in segment.layer_names}
            context.slot_mapping.update(slots)
        with override_forward_context(context):
            hidden, residual = segment(positions, hidden, residual)
        return hidden[:rows], None if residual is None else residual[:rows]


def _kept(step: StageStep | None) -> torch.Tensor | None:
    return None if step is None else step.kept


def _noted(
    exit_states: torch.Tensor | None, kept_before: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    """The states of the whole batch, with those of the stage that ends here brought up to date."""
    if exit_states is None or kept_before is None:
        return states
    return exit_states.index_copy_(0, kept_before, states)
