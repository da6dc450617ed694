# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The vision tower's own training, in CLIP's stead: what each patch of a picture shows."""

from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.quality.model import PATCH, SIDE
from benchmarks.quality.scenes import CELL, CHARACTERS, COLOURS, GRID, LETTER_WIDTH, SHAPES, Scene

# By what is asked of a patch, how many answers there are; where there may be nothing, 0 says so.
LABELS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "character": len(CHARACTERS) + 1,
    "number": GRID * GRID + 1,
    "row": GRID,
    "column": GRID,
}


def labels(scene: Scene) -> dict[str, np.ndarray]:
    """By label, an array `(SIDE, SIDE)`.

    `number` is an object's or a character's place in reading order, from 1 on: what stands before it counts.
    """
    cells = np.arange(SIDE) * PATCH // CELL
    found = {name: np.zeros((SIDE, SIDE), np.int64) for name in LABELS}
    found["row"][:], found["column"][:] = cells[:, None], cells[None, :]
    for number, item in enumerate(scene.items, start=1):
        here = np.ix_(cells == item.row, cells == item.column)
        found["colour"][here] = list(COLOURS).index(item.colour) + 1
        found["shape"][here] = SHAPES.index(item.shape) + 1
        found["number"][here] = number
    for column in range(SIDE):
        number = (column * PATCH + PATCH // 2 - scene.text_left) // LETTER_WIDTH
        if 0 <= number < len(scene.text):
            here = np.ix_(cells == scene.text_row, [column])
            found["character"][here] = CHARACTERS.index(scene.text[number]) + 1
            found["number"][here] = number + 1
    return found


def pictures(rows: int, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels `(rows, SIZE, SIZE, 3)` and labels `(rows, SIDE * SIDE)`. A number always gives the same."""
    pixels, found = [], []
    for row in range(rows):
        rng = Random(f"vision train {number * rows + row}")
        scene = Scene.random(rng)
        pixels.append(np.asarray(scene.draw(rng)))
        found.append(labels(scene))
    stacked = {name: np.stack([each[name].ravel() for each in found]) for name in LABELS}
    return torch.from_numpy(np.stack(pixels)), {n: torch.from_numpy(a) for n, a in stacked.items()}


class PatchReader(nn.Module):
    """One linear layer for every label, on a patch's features `(..., hidden)`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in LABELS.items()})

    def forward(
        self, features: torch.Tensor, wanted: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and by label the share of patches read right, those of label 0 aside."""
        losses, shares = [], {}
        for name, head in self.heads.items():
            logits, target = head(features).flatten(0, 1), wanted[name].flatten()
            losses.append(cross_entropy(logits, target))
            shown = target > 0
            shares[name] = (logits.argmax(-1) == target)[shown].float().mean().item()
        return torch.stack(losses).sum(), shares
