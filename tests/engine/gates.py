# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Random gates whose thresholds divide the requests of these tests, and what such requests have to answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import MODEL, SHAPES, Ask, assert_follows
from tests.engine.reference import Reference

LAYERS = (2, 4, 6)
ALWAYS, NEVER = -1e9, 1e9
ASKED = [ask for ask in SHAPES if ask.images and not ask.prompt.endswith("<image>")]
"""Those with text behind their last picture."""


@dataclass(frozen=True)
class Gated:
    """Random gates, and thresholds for them.

    Attributes:
        file: The policy file.
        weights: By layer: of a gate's first map and its second.
        thresholds: By layer.
    """

    file: Path
    weights: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    thresholds: Mapping[int, float]

    @property
    def options(self) -> dict[str, Any]:
        return {"policy": str(self.file)}

    def exit_layer(
        self, oracle: Reference, ask: Ask, prompt: Sequence[int], model: SmallLlava = MODEL
    ) -> int:
        """Where the request's visual tokens leave; the number of layers where they stay."""
        if not ask.images or prompt[-1] == oracle.image_token:
            return model.layers
        margins = oracle.margins(prompt, [oracle.embeds(image) for image in ask.images], self.weights)
        left = [layer for layer, threshold in self.thresholds.items() if margins[layer] > threshold]
        return left[0] if left else model.layers


def random_gates(
    layers: Sequence[int], model: SmallLlava = MODEL
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    return {layer: (matrix(2048, 2 * model.hidden), matrix(2, 2048)) for layer in layers}


def gated(
    folder: Path,
    weights: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    thresholds: Sequence[float],
    model: SmallLlava = MODEL,
) -> Gated:
    """A policy file of these gates, and their file."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, (first, second) in weights.items():
        tensors |= {f"{layer}.0.weight": first, f"{layer}.2.weight": second}
    save_file(tensors, folder / "gates.safetensors")
    content = {
        "format": "vllm-vtw-policy/1",
        "model": {
            "model_type": model.model_type,
            "num_hidden_layers": model.layers,
            "hidden_size": model.hidden,
        },
        "stages": [{"layer": layer, "keep": 0} for layer in weights],
        "ranking": None,
        "gate": {
            "weights": "gates.safetensors",
            "sha256": sha256((folder / "gates.safetensors").read_bytes()).hexdigest(),
            "thresholds": list(thresholds),
        },
    }
    (folder / "policy.json").write_text(json.dumps(content))
    return Gated(folder / "policy.json", weights, dict(zip(weights, thresholds, strict=True)))


def dividing(
    folder: Path,
    oracle: Reference,
    asks: Sequence[Ask] = ASKED,
    model: SmallLlava = MODEL,
    layers: Sequence[int] = LAYERS,
) -> Gated:
    """Gates with thresholds by which some of these requests leave at each layer, and some never.

    The thresholds lie in the widest gaps between margins: no margin is close to one, where two ways of adding
    up could decide differently.
    """
    weights = random_gates(layers, model)
    per_image = model.image_side**2
    margins = []
    for ask in asks:
        text = ask.prompt.replace("<image>", "<image>" * per_image)
        prompt = oracle.processor.tokenizer(text)["input_ids"]
        margins.append(oracle.margins(prompt, [oracle.embeds(image) for image in ask.images], weights))
    thresholds, staying = [], margins
    for layer in layers:
        staying = sorted(staying, key=lambda margin: margin[layer])
        ascending = [margin[layer] for margin in staying]
        # At least half of them stay, so that some are left for the deeper gates.
        gap, stay = max(
            (ascending[n] - ascending[n - 1], n) for n in range((len(staying) + 1) // 2, len(staying))
        )
        assert gap > 1e-3
        thresholds.append(ascending[stay] - gap / 2)
        staying = staying[:stay]
    return gated(folder, weights, thresholds, model)


def assert_gated(oracle: Reference, ask: Ask, output: Any, gates: Gated, model: SmallLlava = MODEL) -> int:
    """The answer is the reference's greedy one, token for token. Returns the layer of its exit."""
    prompt = output.prompt_token_ids
    layer = gates.exit_layer(oracle, ask, prompt, model)
    assert_follows(oracle, ask, prompt, output.outputs[0].token_ids, layer, align_to=1)
    return layer
