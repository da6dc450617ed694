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
