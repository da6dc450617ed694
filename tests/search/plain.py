# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The published search, plainly: for every K the whole model runs anew, and its layer K drops rows.

It sees what is visual from the token ids, and shares no code with the package.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tests.engine.image_orders import dithered, diverse


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
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    said: list[int],
    keeps: list[float],
    ranking: str = "last-token-attention",
) -> torch.Tensor:
    """The same where layer i gets `ceil(keeps[i] * N)` of N visual tokens, or of those of each square image.

    Attention is eager, and written out.
    """
    prompt = inputs["input_ids"]
    decoder = model.model.language_model
    embedded = model(**inputs, output_hidden_states=True).hidden_states[0]
    hidden = torch.cat([embedded, decoder.embed_tokens(torch.tensor([said[:-1]]))], 1)
    last, here = prompt.shape[1] - 1, list(range(hidden.shape[1]))
    visual = [at for at in here[:last] if int(prompt[0, at]) == model.config.image_token_index]
    images = [at for at, token in enumerate(prompt[0].tolist()) if token == model.config.image_token_index]
    size = len(images) // len(inputs["pixel_values"])
    of_images = [images[start : start + size] for start in range(0, len(images), size)]
    orders = [
        diverse(hidden[0, image]) if ranking == "diversity" else dithered(round(size**0.5))
        for image in of_images
    ]
    everything, scores = len(visual), [0.0] * len(here)
    for layer, keep in zip(decoder.layers, keeps, strict=True):
        parts = round(keep * 1000)
        if ranking in ("uniform", "diversity"):
            gone = {
                image[place]
                for image, order in zip(of_images, orders, strict=True)
                for place in order[-(-parts * size // 1000) :]
            } - {last}
            if ranking == "diversity":
                # The first token of an image that follows no text.
                gone -= {image[0] for image in of_images if image[0] == 0 or image[0] - 1 in images}
        else:
            got = dict(zip(here, scores, strict=True))
            visual.sort(key=lambda at: (-got[at], at))
            gone = set(visual[-(-parts * everything // 1000) :])
        visual = [at for at in visual if at not in gone]
        hidden = hidden[:, [at not in gone for at in here]]
        here = [at for at in here if at not in gone]
        rotary = decoder.rotary_emb(hidden, torch.tensor([here]))
        mask = torch.full((len(here), len(here)), float("-inf")).triu(1)[None, None]
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[1]))
        before = hidden
        hidden = layer(before, attention_mask=mask, position_embeddings=rotary)
        hook.remove()
        if ranking == "variation":
            scores = (hidden - before)[0].square().sum(-1).sqrt().tolist()
        elif ranking == "key-norm":
            keys = layer.self_attn.k_proj(layer.input_layernorm(before))[0]
            lengths = keys.unflatten(-1, (-1, layer.self_attn.head_dim)).square().sum(-1).sqrt()
            scores = (-lengths.sum(-1)).tolist()
        else:
            scores = seen[0][0, :, here.index(last)].mean(0).tolist()
    return model.lm_head(decoder.norm(hidden))[0, here.index(last) :]
