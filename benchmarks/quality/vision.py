# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Trains the vision tower to tell what each patch of an image shows. This replaces CLIP's training."""

from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.quality.model import PATCH, SIDE
from benchmarks.quality.scenes import CELL, CHARACTERS, COLOURS, GRID, LETTER_WIDTH, SHAPES, Scene

# What a patch is asked for, and the number of possible answers. If a patch may show nothing, 0 says so.
LABELS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "character": len(CHARACTERS) + 1,
    "number": GRID * GRID + 1,
    "row": GRID,
    "column": GRID,
}


def labels(scene: Scene) -> dict[str, np.ndarray]:
    """The right answers for the patches of a scene, each an array of shape `(SIDE, SIDE)`.

    `number` is the place of an object among the objects in reading order, or of a character in the string,
    from 1 on. To know it, a patch has to attend to what is before it.
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
    """A batch of images and their labels.

    Args:
        rows: The number of images.
        number: The number of the batch. A batch of the same number is always the same.

    Returns:
        The pixels, shape `(rows, SIZE, SIZE, 3)`, and the labels by name, each `(rows, SIDE * SIDE)`.
    """
    pixels, found = [], []
    for row in range(rows):
        rng = Random(f"vision train {number * rows + row}")
        scene = Scene.random(rng)
        pixels.append(np.asarray(scene.draw(rng)))
        found.append(labels(scene))
    stacked = {name: np.stack([each[name].ravel() for each in found]) for name in LABELS}
    return torch.from_numpy(np.stack(pixels)), {n: torch.from_numpy(a) for n, a in stacked.items()}


class PatchReader(nn.Module):
    """Reads every label from a patch's features, with a linear layer for each.

    Args:
        hidden: The number of features of a patch.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in LABELS.items()})

    def forward(
        self, features: torch.Tensor, wanted: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and for each label the fraction of patches that are read right, without those of label 0.

        Args:
            features: The features of patches, shape `(rows, patches, hidden)`.
            wanted: The labels by name, each of shape `(rows, patches)`.
        """
        losses, shares = [], {}
        for name, head in self.heads.items():
            logits, target = head(features).flatten(0, 1), wanted[name].flatten()
            losses.append(cross_entropy(logits, target))
            shown = target > 0
            shares[name] = (logits.argmax(-1) == target)[shown].float().mean().item()
        return torch.stack(losses).sum(), shares
