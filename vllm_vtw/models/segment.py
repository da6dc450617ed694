"""The layers of one stage, compiled as one region."""

from types import FunctionType
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig


class Segment(nn.Module):
    """Decoder layers that compute the same tokens, with the final norm where they are the last.

    Layers and norm stay registered where the text model has them; here they lie in a list, which registers
    nothing.
    """

    def __init__(self, *, vllm_config: VllmConfig, layers: list[Any], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = layers
        self.final = [norm]
        self.layer_names = [layer.self_attn.attn.layer_name for layer in layers]

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and residual of every token; after the final norm there is no residual.

        Args:
            positions: Position ids, shape `(tokens,)`.
            hidden_states: Shape `(tokens, hidden_size)`.
            residual: Shape `(tokens, hidden_size)`; None before layer 0.
        """
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        if self.final[0] is None:
            return hidden_states, residual
        return self.final[0](hidden_states, residual)[0], None


def compiled_segment(
    vllm_config: VllmConfig, stage: int, layers: list[Any], norm: nn.Module | None
) -> Segment:
    """The segment of `stage`, compiled where vLLM's configuration says so.

    vLLM files compiled code under the class's tag and the name of its `forward`: segments that shared them
    would take each other's from the cache.
    """
    name = f"Segment{stage}"
    code = Segment.forward.__code__.replace(co_name=f"forward_{stage}", co_qualname=f"{name}.forward")
    forward = FunctionType(code, Segment.forward.__globals__, code.co_name, Segment.forward.__defaults__)
    forward.__qualname__ = code.co_qualname
    forward.__annotations__ = Segment.forward.__annotations__
    tokens = {0: "tokens"}
    compiled = support_torch_compile(
        dynamic_arg_dims={"positions": tokens, "hidden_states": tokens, "residual": tokens}
    )(type(name, (Segment,), {"forward": forward}))
    with set_model_tag(name.lower()):
        return compiled(vllm_config=vllm_config, layers=layers, norm=norm)
