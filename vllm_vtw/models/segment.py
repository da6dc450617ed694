# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The layers of one stage, which are compiled together."""

from types import FunctionType
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import DynamicArgDims, support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors


class Segment(nn.Module):
    """Decoder layers that compute the same tokens, followed by the final norm if they are the last.

    Text model and layers are held in lists, which register nothing, so layers stay registered in the text
    model only.

    Args:
        vllm_config: vLLM's configuration. vLLM's compilation decorator reads it.
        text_model: vLLM's text model.
        layers: Which of its layers these are.
        has_norm: Whether the final norm follows.

    Attributes:
        layer_names: The names of the layers' attention, under which vLLM keeps attention metadata.
        shows_before_last: Whether it also returns the states before its last layer. The decoder sets it.
    """

    def __init__(self, *, vllm_config: VllmConfig, text_model: Any, layers: range, has_norm: bool) -> None:
        super().__init__()
        self.text_model = [text_model]
        self.first_layer = layers.start
        self.layers = list(text_model.layers[layers.start : layers.stop])
        self.has_norm = has_norm
        self.shows_before_last = False
        self.layer_names = [attention_of(layer).layer_name for layer in self.layers]

    @property
    def seen_layers(self) -> list[int]:
        """The layers of which a drafter sees the states before them (EAGLE-3).

        vLLM sets them in the text model after it has been loaded.
        """
        wanted = getattr(self.text_model[0], "aux_hidden_state_layers", ())
        # The state at a border belongs to the segment that ends there.
        first = self.first_layer + (self.first_layer > 0)
        return [layer for layer in wanted if first <= layer <= self.first_layer + len(self.layers)]

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Runs the layers.

        Args:
            positions: Position ids, tokens in the last dimension.
            hidden_states: Hidden states, shape `(tokens, hidden_size)`.
            residual: The residual stream, same shape. None before layer 0.
            deepstack: What Qwen3-VL adds to the hidden states after each of the first layers, same shape.
                None if the first layer of the segment is not layer 0, and for other models.

        Returns:
            Hidden states, residual, and the states of `seen_layers`, all of the same shape. The last of these
            are those before the last layer, if it shows them. The residual is None after the final norm.
        """
        (text_model,) = self.text_model
        seen_layers, seen = self.seen_layers, []
        if self.first_layer == 0 and 0 in seen_layers:
            seen.append(hidden_states)
        for index, layer in enumerate(self.layers, self.first_layer):
            if layer is self.layers[-1] and self.shows_before_last:
                # Layer 0 takes its input for the residual, to which kernels add in place.
                before_last = hidden_states.clone() if residual is None else hidden_states + residual
            hidden_states, residual = layer(positions, hidden_states, residual)
            if deepstack is not None and index < len(deepstack):
                hidden_states = hidden_states + deepstack[f"deepstack_input_embeds_{index}"]
            if index + 1 in seen_layers:
                seen.append(hidden_states + residual)
        if self.shows_before_last:
            seen.append(before_last)
        if not self.has_norm:
            return hidden_states, residual, seen
        return text_model.norm(hidden_states, residual)[0], None, seen


def attention_of(layer: nn.Module) -> Attention:
    """The attention of a decoder layer. Text models have different names for it."""
    (attention,) = (module for module in layer.modules() if isinstance(module, Attention))
    return attention


def compiled_segment(
    vllm_config: VllmConfig, stage: int, text_model: Any, layers: range, has_norm: bool
) -> Segment:
    """Makes the segment of a stage, compiled if vLLM's configuration says so.

    vLLM's compilation cache finds compiled code by the model tag and the name of `forward`. Each segment gets
    its own, because segments with the same ones would load each other's code.

    Args:
        vllm_config: vLLM's configuration.
        stage: Number of the stage.
        text_model: vLLM's text model.
        layers: Which of its layers these are.
        has_norm: Whether the final norm follows.
    """
    name = f"Segment{stage}"
    code = Segment.forward.__code__.replace(co_name=f"forward_{stage}", co_qualname=f"{name}.forward")
    forward = FunctionType(code, Segment.forward.__globals__, code.co_name, Segment.forward.__defaults__)
    forward.__qualname__ = code.co_qualname
    forward.__annotations__ = Segment.forward.__annotations__
    tokens = {0: "tokens"}
    dims: DynamicArgDims = dict.fromkeys(("hidden_states", "residual", "deepstack"), tokens)
    compiled = support_torch_compile(dynamic_arg_dims={"positions": {-1: "tokens"}, **dims})(
        type(name, (Segment,), {"forward": forward})
    )
    with set_model_tag(name.lower()):
        return compiled(vllm_config=vllm_config, text_model=text_model, layers=layers, has_norm=has_norm)
