# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A decoder cut into one segment for each stage. Each segment computes the tokens that its stage retains."""

import functools
from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import AttentionType

from vllm_vtw.families import DECODERS, ELSEWHERE
from vllm_vtw.models.adapters import StageAdapters
from vllm_vtw.models.gather_scatter import TokenStates
from vllm_vtw.models.graph_inputs import GraphInputs
from vllm_vtw.models.segment import Segment, attention_of, compiled_segment
from vllm_vtw.policy import BY_ATTENTION, BY_STATE, Policy
from vllm_vtw.rankings import ATTENTION_RANKINGS, STATE_RANKINGS
from vllm_vtw.startup.drafters import drafter_layers
from vllm_vtw.startup.options import layer_groups
from vllm_vtw.worker.attention_backend import StageAttention
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.gates import Gates
from vllm_vtw.worker.ranking import attach_ranking, scores_by_state
from vllm_vtw.worker.stage_step import StageStep


class StagedDecoder:
    """Runs a pipeline rank's layers of a vLLM text model and withdraws tokens between its segments.

    It is not an `nn.Module`, so the layers stay registered in the text model only, under their own names.

    Args:
        vllm_config: vLLM's configuration.
        text_model: vLLM's text model, of a class in `DECODERS`.
        policy: What is withdrawn, and from which layers on.
        step: What the current step computes in each stage.

    Attributes:
        stages: The stages that this pipeline rank has layers of.
        segments: By stage, the layers of this rank.
        graph_inputs: The buffers that CUDA graphs of the segments read.
        has_drafter: Whether a drafter for speculative decoding sees the states of all tokens.
        adapters: Sets the LoRA adapters of a stage's tokens. None without `--enable-lora`.
        state_ranking: What visual tokens are ranked by, if it is their states. None if not.
    """

    def __init__(self, vllm_config: VllmConfig, text_model: Any, policy: Policy, step: CurrentStep) -> None:
        self.text_model = text_model
        self.step = step
        self.is_last_rank = get_pp_group().is_last_rank
        start, end = text_model.start_layer, text_model.end_layer
        borders = [stage.layer for stage in policy.stages]
        self.stages = range(bisect_right(borders, start), bisect_right(borders, end - 1) + 1)
        self.segments: dict[int, Segment] = {}
        for stage, layers in enumerate(policy.segments(len(text_model.layers))):
            own = range(max(layers.start, start), min(layers.stop, end))
            if own:
                has_norm = self.is_last_rank and own.stop == end
                self.segments[stage] = compiled_segment(vllm_config, stage, text_model, own, has_norm)
        if policy.stages:
            groups = layer_groups(vllm_config, policy)
            for index, group in list(enumerate(groups.by_layer()))[start:end]:
                if group.stage > 0 or group.pages > 1 or len(groups.ranks) > 1:
                    StageAttention.adopt(attention_of(text_model.layers[index]), groups, group, step)
        if policy.ranking in BY_ATTENTION:
            ranking = ATTENTION_RANKINGS[policy.ranking]()
            for stage, border in enumerate(borders, 1):
                attach_ranking(attention_of(text_model.layers[border - 1]), stage, step, ranking)
        self.state_ranking = None
        if policy.ranking in BY_STATE:
            self.state_ranking = STATE_RANKINGS[policy.ranking]()
            for stage in range(len(borders)):
                self.segments[stage].shows_before_last = True
        if policy.gate is not None:
            step.gates = Gates(policy, vllm_config.model_config.get_hidden_size(), step.device)
        self.graph_inputs = GraphInputs(vllm_config, step.device)
        self.has_drafter = drafter_layers(vllm_config) > 0
        self.adapters = None if vllm_config.lora_config is None else StageAdapters(text_model)

    @classmethod
    def install(
        cls, vllm_config: VllmConfig, text_model: Any, policy: Policy, step: CurrentStep
    ) -> "StagedDecoder":
        """Makes a staged decoder that runs whenever the text model is called.

        The model around it goes on as in stock vLLM. The arguments are those of the class.
        """
        decoder = cls(vllm_config, text_model, policy, step)
        vllm_model: Any = type(text_model)
        text_model.__class__ = staged_text_model(vllm_model)
        text_model.staged_decoder = decoder
        return decoder

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        received: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
        deepstack: IntermediateTensors | None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | IntermediateTensors:
        """Runs this pipeline rank's layers for one step.

        Args:
            input_ids: Token ids, shape `(tokens,)`. Ignored if `inputs_embeds` is given.
            positions: Position ids, shape `(tokens,)`, or `(dims, tokens)` with M-RoPE. Withdrawn tokens
                count, too.
            received: The hidden states and residual that the previous pipeline rank returned. None on the
                first rank.
            inputs_embeds: Embeddings of text and image tokens, shape `(tokens, hidden_size)`.
            deepstack: As `Segment.forward` takes it. Withdrawal begins behind its layers.

        Returns:
            On the last rank, the final hidden states, shape `(tokens, hidden_size)`, together with the states
            that a drafter wants to see, if it does. On other ranks, hidden states and residual, both of that
            shape. `TokenStates.scatter` says what the rows of withdrawn tokens contain.
        """
        # There is no batch when vLLM measures memory, or when a data-parallel rank without requests runs a
        # step because the others do.
        is_dummy = get_forward_context().attn_metadata is None
        steps = self._steps(is_dummy)
        if received is None:
            embedded = self.text_model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            states = TokenStates(embedded, residual=None)
        else:
            states = TokenStates(received["hidden_states"], received["residual"])

        seen_by_drafter = []
        for stage in self.stages:
            if stage > self.stages.start and self.step.gated_prompts and not is_dummy:
                assert states.residual is not None
                changed = self.step.ask_gates(stage, states.hidden, states.residual)
                get_forward_context().attn_metadata.update(changed)
                steps = self._steps(is_dummy)
            states.gather(steps[stage], self.step.prompt_logprobs or self.has_drafter)
            if self.adapters is not None and states.kept is not None:
                self.adapters.select(states.kept)
            if stage == 0:
                self._set_slots(self.segments[0], len(states.hidden))
                states.hidden, states.residual, seen = self.segments[0](
                    positions, states.hidden, states.residual, deepstack
                )
            else:
                states.hidden, states.residual, seen = self._run(
                    stage, steps[stage], positions, states.hidden, states.residual
                )
            if self.segments[stage].shows_before_last:
                self._rank_by_state(steps[stage + 1], seen.pop(), states)
            # The graphs of the next segment may write to the memory that those of this one return.
            seen_by_drafter += [states.of_batch(of_stage).clone() for of_stage in seen]

        if self.adapters is not None:
            self.adapters.restore()
        states.scatter(positions.shape[-1], self.text_model.norm if self.is_last_rank else None)
        if self.is_last_rank:
            return (states.hidden, seen_by_drafter) if seen_by_drafter else states.hidden
        assert states.residual is not None
        return IntermediateTensors({"hidden_states": states.hidden, "residual": states.residual})

    def _rank_by_state(self, step: StageStep | None, before: torch.Tensor, states: TokenStates) -> None:
        """Ranks the tokens for the stage that follows, if prompts of this step do.

        Args:
            step: What the step computes in that stage.
            before: The states of the current stage's tokens before its last layer.
            states: Their states now.
        """
        if step is None or step.ranked is None:
            return
        assert self.state_ranking is not None
        assert states.residual is not None
        scores = self.state_ranking.score(before, states.hidden + states.residual)
        step.apply_ranking(scores_by_state(step.ranked, scores))

    def _steps(self, is_dummy: bool) -> tuple[StageStep | None, ...]:
        """What the step computes in each stage, starting with stage 0. None if it computes all tokens."""
        return (None, *((None,) * self.step.num_stages if is_dummy else self.step.stages))

    def _run(
        self,
        stage: int,
        step: StageStep | None,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Runs one segment past the first, which may compute fewer tokens than the batch has.

        If the step uses piecewise CUDA graphs, or would use them if the batch were not too large, the segment
        runs the smallest graph that is large enough for its own tokens.

        Args:
            stage: The segment's stage.
            step: What the step computes in the stage. None if it computes all tokens.
            positions: Position ids of the batch, tokens in the last dimension.
            hidden: Hidden states of the tokens that the stage computes, shape `(kept, hidden_size)`.
            residual: Their residual stream, same shape. None before layer 0.

        Returns:
            As `Segment.forward`, for the tokens that the stage computes.
        """
        segment, context = self.segments[stage], get_forward_context()
        rows = len(hidden)
        if rows == 0:
            # All tokens of the step are withdrawn. Layer 0 would make a residual.
            residual = hidden if residual is None else residual
            return hidden, residual, [hidden] * (len(segment.seen_layers) + segment.shows_before_last)
        piecewise = context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        kept = None if step is None else step.kept
        size = rows if piecewise else None
        if kept is not None:
            # The batch may be too large for any graph, and its kept tokens few enough for one.
            if piecewise or self.graph_inputs.size(positions.shape[-1]) is None:
                size = self.graph_inputs.size(rows)
            positions = positions[..., kept]
        if size is not None:
            positions, hidden, residual = self.graph_inputs.write(size, positions, hidden, residual)
            of_batch = context.batch_descriptor if piecewise else None
            context = replace(
                context,
                cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
                batch_descriptor=self.graph_inputs.descriptor(size, of_batch),
            )
        elif self.graph_inputs.uses_mrope:
            positions = self.graph_inputs.write_positions(rows, positions)
        with override_forward_context(context):
            self._set_slots(segment, len(hidden))
            hidden, residual, seen = segment(positions, hidden, residual)
        seen = [states[:rows] for states in seen]
        return hidden[:rows], None if residual is None else residual[:rows], seen

    def _set_slots(self, segment: Segment, num_tokens: int) -> None:
        """Tells the layers that have slots of their own where to store keys and values."""
        context = get_forward_context()
        if context.attn_metadata is not None:
            own = self.step.slots.keys() & segment.layer_names
            context.slot_mapping.update({name: self.step.slots[name].view(num_tokens) for name in own})


def find_text_model(language_model: Any) -> Any:
    """Finds the text model whose layers are staged.

    Args:
        language_model: vLLM's language model, which contains it.

    Raises:
        ValueError: There is none of a supported class, or its layers attend over a sliding window or in both
            directions.
    """
    supported = {f"vllm.model_executor.models.{name}" for name in DECODERS.values()}
    found = [
        module
        for module in language_model.modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in supported
    ]
    if len(found) != 1:
        raise ValueError(
            f"--model-impl vtw does not support the text model {type(language_model).__name__}; supported "
            f"are {', '.join(DECODERS)}: {ELSEWHERE}"
        )
    (text_model,) = found
    for layer in text_model.layers[text_model.start_layer : text_model.end_layer]:
        attention = attention_of(layer)
        if attention.sliding_window is not None or attention.attn_type != AttentionType.DECODER:
            raise ValueError(
                "--model-impl vtw does not support layers that attend over a sliding window, or to tokens "
                f"that follow: {ELSEWHERE}"
            )
    return text_model


@functools.cache
def staged_text_model(text_model: Any) -> type:
    """A subclass of a vLLM text model that runs a staged decoder in place of its own layers."""

    class StagedTextModel(text_model):
        staged_decoder: StagedDecoder

        def forward(
            self,
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: IntermediateTensors | None = None,
            inputs_embeds: torch.Tensor | None = None,
            deepstack_input_embeds: IntermediateTensors | None = None,
        ) -> torch.Tensor | IntermediateTensors:
            return self.staged_decoder(
                input_ids, positions, intermediate_tensors, inputs_embeds, deepstack_input_embeds
            )

        # vLLM's own would compile the layers once more, in one piece.
        __call__ = forward

    return StagedTextModel
