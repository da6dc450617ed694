"""A decoder on transformers that goes on with the visual tokens which the end of the prompt attends to most.

Layer by layer, so that a search can try what follows without computing again what came before.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_vtw.search.model import FullAnswer, HFModel


@dataclass(frozen=True)
class LayerInput:
    """The tokens of a prompt and its answer that a layer gets.

    Attributes:
        hidden: Shape `(rows, hidden)`.
        positions: In prompt and answer as they came, shape `(rows,)`.
        is_candidate: Whether a row is a visual token, but the prompt's last, shape `(rows,)`.
        attention: That the prompt's last token paid to each row in the layer before, mean over heads, shape
            `(rows,)`, float32. Zero before the first layer, and behind one that does not rank.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    is_candidate: torch.Tensor
    attention: torch.Tensor
    last: int
    """Index of the prompt's last token."""

    @classmethod
    def of(cls, answered: FullAnswer) -> "LayerInput":
        """What layer 0 gets."""
        count = len(answered.embedded)
        return cls(
            answered.embedded,
            torch.arange(count, device=answered.embedded.device),
            answered.is_visual,
            torch.zeros(count, device=answered.embedded.device),
            count - len(answered.tokens),
        )

    @property
    def candidates(self) -> int:
        return int(self.is_candidate.sum())

    def withdrawn(self, kept: int) -> "LayerInput":
        """The same with the `kept` candidates that got the most attention, the first ones where it ties."""
        if kept >= self.candidates:
            return self
        score = torch.where(self.is_candidate, self.attention, torch.inf)
        order = score.sort(descending=True, stable=True).indices
        stays = order[: len(score) - self.candidates + kept].sort().values
        return LayerInput(
            self.hidden[stays],
            self.positions[stays],
            self.is_candidate[stays],
            self.attention[stays],
            int(torch.searchsorted(stays, self.last)),
        )


@torch.inference_mode()
def run_layer(model: HFModel, index: int, rows: LayerInput, ranks: bool) -> LayerInput:
    """What comes out of layer `index`; `ranks` where the next one needs its attention."""
    layer, positions = model.decoder.layers[index], rows.positions[None]
    cos, sin = model.decoder.rotary_emb(rows.hidden[None], position_ids=positions)
    hidden = layer(
        rows.hidden[None], attention_mask=None, position_ids=positions, position_embeddings=(cos, sin)
    )[0]
    attention = torch.zeros(len(hidden), device=hidden.device)
    if ranks:
        seen = slice(rows.last + 1)
        attention[seen] = _attention_of_last(layer, rows.hidden[seen], cos[:, seen], sin[:, seen])
    return replace(rows, hidden=hidden, attention=attention)


def _attention_of_last(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """What the last of some rows pays to each, shape `(rows,)`, float32."""
    states, module = layer.input_layernorm(hidden), layer.self_attn

    def rotated(projected: torch.Tensor) -> torch.Tensor:
        heads = projected.unflatten(-1, (-1, module.head_dim)).transpose(0, 1)[None]
        rows = slice(-heads.shape[2], None)
        turned: torch.Tensor = apply_rotary_pos_emb(heads, heads, cos[:, rows], sin[:, rows])[0]
        return turned[0].float()

    keys, query = rotated(module.k_proj(states)), rotated(module.q_proj(states[-1:]))
    grouped = query[:, 0].unflatten(0, (len(keys), -1))
    weights = (torch.einsum("kgd,knd->kgn", grouped, keys) * module.scaling).softmax(-1)
    return weights.mean((0, 1))


@torch.inference_mode()
def answer_logits(model: HFModel, rows: LayerInput) -> torch.Tensor:
    """What an answer's tokens are chosen by, of the rows behind the last layer, shape `(O, vocabulary)`."""
    logits: torch.Tensor = model.hf_model.lm_head(model.decoder.norm(rows.hidden[rows.last :])).float()
    return logits
