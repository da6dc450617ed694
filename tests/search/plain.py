# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The published search, plainly: for every K the whole model runs anew, and its layer K drops rows.

It sees what is visual from the token ids, and shares no code with the package.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def dropping(layers: Any, first: int, kept: torch.Tensor) -> Iterator[None]:
    """As long as the block lasts, the decoder's layers from `first` on get the kept rows only."""

    def hook(layer: Any, args: tuple[torch.Tensor, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0][:, kept] if layer is layers[first] else args[0]
        cos, sin = given["position_embeddings"]
        rows = int(kept.sum())
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        return (hidden,), given | {
            "position_embeddings": (cos[:, kept], sin[:, kept]),
            "attention_mask": mask,
            "past_key_values": None,
        }

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers[first:]]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@torch.no_grad()
def plain_logits(model: Any, inputs: Mapping[str, torch.Tensor], said: list[int], layer: int) -> torch.Tensor:
    """What each token of the answer `said` is chosen by, shape `(len(said), vocabulary)`."""
    prompt = inputs["input_ids"]
    ids = torch.cat([prompt, torch.tensor([said[:-1]], dtype=prompt.dtype)], 1)
    kept = ids[0] != model.config.image_token_index
    kept[prompt.shape[1] - 1 :] = True
    pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    layers = model.model.language_model.layers
    if layer == len(layers):
        return model(input_ids=ids, **pictures).logits[0, -len(said) :]
    with dropping(layers, layer, kept):
        return model(input_ids=ids, **pictures).logits[0, -len(said) :]


@torch.no_grad()
def plain_ranked_logits(
    model: Any, inputs: Mapping[str, torch.Tensor], said: list[int], keeps: list[float]
) -> torch.Tensor:
    """The same where layer i gets `ceil(keeps[i] * N)` of N visual tokens, ranked by eager attention."""
    prompt = inputs["input_ids"]
    decoder = model.model.language_model
    embedded = model(**inputs, output_hidden_states=True).hidden_states[0]
    hidden = torch.cat([embedded, decoder.embed_tokens(torch.tensor([said[:-1]]))], 1)
    last, here = prompt.shape[1] - 1, list(range(hidden.shape[1]))
    visual = [at for at in here[:last] if int(prompt[0, at]) == model.config.image_token_index]
    everything, weights = len(visual), torch.zeros(1, 1, len(here), len(here))
    for layer, keep in zip(decoder.layers, keeps, strict=True):
        paid = dict(zip(here, weights[0, :, here.index(last)].mean(0).tolist(), strict=True))
        visual.sort(key=lambda at: (-paid[at], at))
        parts = round(keep * 1000)
        gone = set(visual[-(-parts * everything // 1000) :])
        visual = [at for at in visual if at not in gone]
        hidden = hidden[:, [at not in gone for at in here]]
        here = [at for at in here if at not in gone]
        rotary = decoder.rotary_emb(hidden, torch.tensor([here]))
        mask = torch.full((len(here), len(here)), float("-inf")).triu(1)[None, None]
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[1]))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hook.remove()
        weights = seen[0]
    return model.lm_head(decoder.norm(hidden))[0, here.index(last) :]
