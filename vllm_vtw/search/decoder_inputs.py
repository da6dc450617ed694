# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Records what a decoder of transformers and its layers get while a model answers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Deepstack:
    """What Qwen3-VL adds to the hidden states of visual tokens after each of its first layers.

    Withdrawal begins behind these layers. For other models, there are none.

    Attributes:
        places: The places of visual tokens in the prompt, shape `(visual tokens,)`.
        added: For each of the first layers what is added, shape `(visual tokens, hidden_size)`.
    """

    places: torch.Tensor
    added: Sequence[torch.Tensor]

    def after(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states after a layer, with what is added there.

        Args:
            layer: The layer's number, from 0.
            hidden: The hidden states of a prompt, shape `(..., tokens, hidden_size)`.
        """
        if layer >= len(self.added):
            return hidden
        hidden = hidden.clone()
        hidden[..., self.places, :] += self.added[layer]
        return hidden


@dataclass
class DecoderInputs:
    """What a decoder and its layers get in each step of `generate`, for one sequence.

    Attributes:
        is_text: Whether the layers' inputs are kept, for each token of the prompt.
        position_ids: By step, the position ids that the decoder gets.
        embedded: By step, the hidden states that enter layer 0.
        states: By layer and step, the hidden states that enter the layer. Those of the prompt as `is_text`
            says.
        deepstack: As `FullAnswer` has it.
    """

    is_text: torch.Tensor
    position_ids: list[torch.Tensor]
    embedded: list[torch.Tensor]
    states: list[list[torch.Tensor]]
    deepstack: Deepstack

    @classmethod
    @contextmanager
    def of(cls, decoder: Any, is_text: torch.Tensor) -> "Iterator[DecoderInputs]":
        """Records what a decoder gets, as long as the context lasts."""
        nothing = Deepstack(is_text.new_empty(0, dtype=torch.long), ())
        seen = cls(is_text, [], [], [[] for _ in decoder.layers], nothing)
        with ExitStack() as hooks:
            for index, layer in enumerate(decoder.layers):
                hook = layer.register_forward_pre_hook(partial(seen._enter_layer, index))
                hooks.callback(hook.remove)
            hooks.callback(decoder.register_forward_pre_hook(seen._enter, with_kwargs=True).remove)
            yield seen

    def positions(self, count: int) -> torch.Tensor:
        """The position ids of a prompt and its answer, shape `(count,)`, or `(3, count)` with M-RoPE.

        Args:
            count: The number of tokens.
        """
        joined = torch.cat(self.position_ids, dim=-1)
        # With M-RoPE, the last three rows are those of time, height and width.
        found = joined[-3:, 0] if joined.dim() == 3 else joined[0]
        assert found.shape[-1] == count
        return found

    def _enter(self, decoder: Any, args: Any, given: dict[str, Any]) -> None:
        self.position_ids.append(given["position_ids"])
        if added := given.get("deepstack_visual_embeds"):
            self.deepstack = Deepstack(given["visual_pos_masks"][0].nonzero()[:, 0], added)

    def _enter_layer(self, index: int, layer: Any, args: tuple[Any, ...]) -> None:
        (hidden,) = args[0]
        is_prompt = not self.states[index]
        self.states[index].append(hidden[self.is_text] if is_prompt else hidden)
        if index == 0:
            self.embedded.append(hidden)
