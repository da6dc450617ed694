# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs a transformers decoder layer by layer, with ranked visual tokens withdrawn between layers.

A search can try fractions for the deeper layers without computing the shallower ones again.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_vtw.search.decoder_inputs import Deepstack
from vllm_vtw.search.model import FullAnswer, HFModel


@dataclass(frozen=True)
class LayerInput:
    """The tokens of a prompt and its answer that a layer gets, one token a row.

    Attributes:
        hidden: The tokens' hidden states, shape `(rows, hidden_size)`.
        position_ids: The tokens' position ids, withdrawn tokens counted, tokens in the last dimension.
        is_candidate: Whether each token may be withdrawn, shape `(rows,)`. Visual tokens may be, except the
            prompt's last token.
        attention: The attention that the prompt's last token paid to each token in the layer before, as a
            mean over heads, shape `(rows,)`, float32. All 0 before the first layer, and if the layer before
            was run without `ranks`.
        last: The row of the prompt's last token.
        deepstack: As `FullAnswer` has it.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor
    is_candidate: torch.Tensor
    attention: torch.Tensor
    last: int
    deepstack: Deepstack

    @classmethod
    def of(cls, answered: FullAnswer) -> "LayerInput":
        """The tokens that layer 0 gets: the whole prompt, and all but the last token of the answer."""
        count = len(answered.embedded)
        return cls(
            answered.embedded,
            answered.position_ids,
            answered.is_visual,
            torch.zeros(count, device=answered.embedded.device),
            count - len(answered.tokens),
            answered.deepstack,
        )

    @property
    def candidates(self) -> int:
        """The number of tokens that may be withdrawn."""
        return int(self.is_candidate.sum())

    def withdraw(self, kept: int) -> "LayerInput":
        """Withdraws candidates, the ones that received the least attention first.

        Args:
            kept: The number of candidates that stay. Of those with equal attention, the first ones stay.
        """
        if kept >= self.candidates:
            return self
        score = torch.where(self.is_candidate, self.attention, torch.inf)
        order = score.sort(descending=True, stable=True).indices
        stays = order[: len(score) - self.candidates + kept].sort().values
        return replace(
            self,
            hidden=self.hidden[stays],
            position_ids=self.position_ids[..., stays],
            is_candidate=self.is_candidate[stays],
            attention=self.attention[stays],
            last=int(torch.searchsorted(stays, self.last)),
        )


@torch.inference_mode()
def run_layer(model: HFModel, index: int, rows: LayerInput, ranks: bool) -> LayerInput:
    """Runs a decoder layer, and returns the tokens that leave it.

    Args:
        model: The model.
        index: The layer's number, from 0.
        rows: The tokens that the layer gets.
        ranks: Whether to compute `attention`, which is needed if tokens are withdrawn after the layer.
    """
    layer, positions = model.decoder.layers[index], rows.position_ids[..., None, :]
    cos, sin = model.decoder.rotary_emb(rows.hidden[None], position_ids=positions)
    hidden = layer(
        rows.hidden[None], attention_mask=None, position_ids=positions, position_embeddings=(cos, sin)
    )[0]
    hidden = rows.deepstack.after(index, hidden)
    attention = torch.zeros(len(hidden), device=hidden.device)
    if ranks:
        seen = slice(rows.last + 1)
        attention[seen] = _attention_of_last(layer, rows.hidden[seen], cos[:, seen], sin[:, seen])
    return replace(rows, hidden=hidden, attention=attention)


def _attention_of_last(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The attention that the last of some rows pays to each of them, as a mean over heads.

    Args:
        layer: The decoder layer.
        hidden: The hidden states that the layer gets, shape `(rows, hidden_size)`.
        cos: The cosines of the rotary embedding at the rows' positions, shape `(1, rows, head_dim)`.
        sin: The sines, in the same shape.

    Returns:
        Shape `(rows,)`, float32.
    """
    states, module = layer.input_layernorm(hidden), layer.self_attn
    # Families turn heads in different ways, by a function of this name beside their attention.
    apply_rotary_pos_emb = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]

    def rotated(projected: torch.Tensor, norm: str) -> torch.Tensor:
        heads = projected.unflatten(-1, (-1, module.head_dim))
        if hasattr(module, norm):  # as in Qwen3
            heads = getattr(module, norm)(heads)
        heads = heads.transpose(0, 1)[None]
        rows = slice(-heads.shape[2], None)
        turned: torch.Tensor = apply_rotary_pos_emb(heads, heads, cos[:, rows], sin[:, rows])[0]
        return turned[0].float()

    keys = rotated(module.k_proj(states), "k_norm")
    query = rotated(module.q_proj(states[-1:]), "q_norm")
    grouped = query[:, 0].unflatten(0, (len(keys), -1))
    weights = (torch.einsum("kgd,knd->kgn", grouped, keys) * module.scaling).softmax(-1)
    return weights.mean((0, 1))


@torch.inference_mode()
def answer_logits(model: HFModel, rows: LayerInput) -> torch.Tensor:
    """The logits from which the O tokens of an answer are chosen, shape `(O, vocabulary)`, float32.

    Args:
        model: The model.
        rows: The tokens that leave the last layer.
    """
    logits: torch.Tensor = model.head(model.decoder.norm(rows.hidden[rows.last :])).float()
    return logits
