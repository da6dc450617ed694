# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs a transformers decoder layer by layer, with ranked visual tokens withdrawn between layers.

A search can try fractions for the deeper layers without computing the shallower ones again.
"""

import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch

from vllm_vtw.policy import BY_FEATURES, BY_IMAGE, Stage
from vllm_vtw.rankings import ATTENTION_RANKINGS, FEATURE_RANKINGS, IMAGE_RANKINGS, STATE_RANKINGS
from vllm_vtw.search.decoder_inputs import Deepstack
from vllm_vtw.search.model import FullAnswer, HFModel


@dataclass(frozen=True)
class LayerInput:
    """The tokens of a prompt and its answer that a layer gets, one token a row.

    Attributes:
        hidden: The tokens' hidden states, shape `(rows, hidden_size)`.
        position_ids: The tokens' position ids, withdrawn tokens counted, tokens in the last dimension.
        item_of: For each token, the number of its image or video, or -1, shape `(rows,)`.
        item_sizes: The number of visual tokens of each item of the prompt, withdrawn ones included.
        is_candidate: Whether each token may be withdrawn, shape `(rows,)`. Visual tokens may be, except the
            prompt's last token.
        visual_tokens: The number of candidates of the prompt, withdrawn ones included.
        ranking: What candidates are ranked by.
        scores: The score of each token, shape `(rows,)`, float32. Under a ranking by image, these are the
            places of tokens in the orders of their images. Under one by question, they are all 0 before the
            first layer, and if the layer before was run without `ranks`.
        last: The row of the prompt's last token.
        deepstack: As `FullAnswer` has it.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor
    item_of: torch.Tensor
    item_sizes: tuple[int, ...]
    is_candidate: torch.Tensor
    visual_tokens: int
    ranking: str
    scores: torch.Tensor
    last: int
    deepstack: Deepstack

    @classmethod
    def of(cls, answered: FullAnswer, ranking: str) -> "LayerInput":
        """The tokens that layer 0 gets: the whole prompt, and all but the last token of the answer."""
        count = len(answered.embedded)
        return cls(
            answered.embedded,
            answered.position_ids,
            answered.item_of,
            tuple(torch.bincount(answered.item_of[answered.item_of >= 0]).tolist()),
            answered.is_visual,
            answered.visual_tokens,
            ranking,
            torch.zeros(count, device=answered.embedded.device),
            count - len(answered.tokens),
            answered.deepstack,
        ).ranked_by(ranking)

    def ranked_by(self, ranking: str) -> "LayerInput":
        """The same tokens before layer 0, under another ranking."""
        scores = torch.zeros_like(self.scores)
        is_candidate = self.item_of >= 0
        is_candidate[self.last] = False
        for item in range(len(self.item_sizes) if ranking in BY_IMAGE else 0):
            rows = (self.item_of == item).nonzero()[:, 0]
            scores[rows] = _places(ranking, self.hidden[rows])
            if ranking in BY_FEATURES and (rows[0] == 0 or self.item_of[rows[0] - 1] >= 0):
                # The engine computes the first token of an image that follows no text too early.
                is_candidate[rows[0]] = False
        return replace(self, ranking=ranking, is_candidate=is_candidate, scores=scores)

    def withdraw(self, keep: float) -> "LayerInput":
        """Withdraws candidates, the ones that are ranked lowest first.

        Args:
            keep: The fraction of candidates that stays, of those of the whole prompt or, under a ranking by
                image, of the tokens of each image and video.
        """
        stage = Stage(0, keep)
        if self.ranking in BY_IMAGE:
            stays = ~self.is_candidate
            for item, size in enumerate(self.item_sizes):
                stays |= (self.item_of == item) & (self.scores < stage.kept(size))
            rows = stays.nonzero()[:, 0]
        else:
            candidates = int(self.is_candidate.sum())
            kept = min(stage.kept(self.visual_tokens), candidates)
            worth = torch.where(self.is_candidate, self.scores, torch.inf)
            order = worth.sort(descending=True, stable=True).indices
            rows = order[: len(worth) - candidates + kept].sort().values
        if len(rows) == len(self.hidden):
            return self
        return replace(
            self,
            hidden=self.hidden[rows],
            position_ids=self.position_ids[..., rows],
            item_of=self.item_of[rows],
            is_candidate=self.is_candidate[rows],
            scores=self.scores[rows],
            last=int(torch.searchsorted(rows, self.last)),
        )


def _places(ranking: str, features: torch.Tensor) -> torch.Tensor:
    """The place of each token of an image in its order, shape `(tokens,)`.

    Args:
        ranking: The name of a ranking by image.
        features: The states of the tokens before layer 0, shape `(tokens, hidden_size)`.
    """
    count = len(features)
    if ranking in BY_FEATURES:
        order = FEATURE_RANKINGS[ranking]().order(features, count)
    else:
        # vLLM's hash of the image is not known here, so `random` draws other lots than the engine does.
        digest = sha256(features.float().cpu().numpy().tobytes()).hexdigest()
        order = torch.from_numpy(IMAGE_RANKINGS[ranking]().order(count, digest)).to(features.device)
    places = torch.empty(count, device=features.device)
    places[order] = torch.arange(count, device=features.device, dtype=places.dtype)
    return places


@torch.inference_mode()
def run_layer(model: HFModel, index: int, rows: LayerInput, ranks: bool) -> LayerInput:
    """Runs a decoder layer, and returns the tokens that leave it.

    Args:
        model: The model.
        index: The layer's number, from 0.
        rows: The tokens that the layer gets.
        ranks: Whether to compute the scores of a ranking by question, which are needed if tokens are
            withdrawn after the layer.
    """
    layer, positions = model.decoder.layers[index], rows.position_ids[..., None, :]
    cos, sin = model.decoder.rotary_emb(rows.hidden[None], position_ids=positions)
    hidden = layer(
        rows.hidden[None], attention_mask=None, position_ids=positions, position_embeddings=(cos, sin)
    )[0]
    hidden = rows.deepstack.after(index, hidden)
    if rows.ranking in BY_IMAGE:
        return replace(rows, hidden=hidden)
    scores = torch.zeros(len(hidden), device=hidden.device)
    seen = slice(rows.last + 1)
    if ranks and rows.ranking in STATE_RANKINGS:
        scores[seen] = STATE_RANKINGS[rows.ranking]().score(rows.hidden[seen], hidden[seen])
    elif ranks:
        query, keys = _query_and_keys(layer, rows.hidden[seen], cos[:, seen], sin[:, seen])
        scale = layer.self_attn.scaling
        scores[seen] = ATTENTION_RANKINGS[rows.ranking]().score(query, keys, scale)
    return replace(rows, hidden=hidden, scores=scores)


def _query_and_keys(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query of the last of some rows, and the keys of all of them, after the rotary embedding.

    Args:
        layer: The decoder layer.
        hidden: The hidden states that the layer gets, shape `(rows, hidden_size)`.
        cos: The cosines of the rotary embedding at the rows' positions, shape `(1, rows, head_dim)`.
        sin: The sines, in the same shape.

    Returns:
        Shapes `(heads, head_dim)` and `(rows, kv_heads, head_dim)`.
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
        return turned[0].transpose(0, 1)

    return rotated(module.q_proj(states[-1:]), "q_norm")[0], rotated(module.k_proj(states), "k_norm")


@torch.inference_mode()
def answer_logits(model: HFModel, rows: LayerInput) -> torch.Tensor:
    """The logits from which the O tokens of an answer are chosen, shape `(O, vocabulary)`, float32.

    Args:
        model: The model.
        rows: The tokens that leave the last layer.
    """
    logits: torch.Tensor = model.head(model.decoder.norm(rows.hidden[rows.last :])).float()
    return logits
