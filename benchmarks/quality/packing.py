# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes training rows: an image, and as many questions about it as fit.

A question attends to the image and to itself, but not to other questions, and its positions are those that it
has in a request of its own. A row's answers are therefore the same as those of single requests, but the image
is computed only once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.model import PICTURE_PART, VISUAL_TOKENS, question_part
from benchmarks.quality.scenes import Scene
from benchmarks.quality.tasks import AUXILIARY_TASKS, TASKS, Question, ask

ROW = 320  # tokens
IGNORE = -100


@dataclass
class Batch:
    """Rows of `ROW` tokens.

    Attributes:
        pixels: The images, values from 0 to 255, shape `(rows, SIZE, SIZE, 3)`.
        ids: The token ids, shape `(rows, ROW)`. There is an image token for every visual token.
        targets: The next token if it belongs to an answer, else `IGNORE`, shape `(rows, ROW)`.
        weights: The weight of each target in the loss, shape `(rows, ROW)`. The weights of an answer add up
            to the square root of its length.
        positions: The position of each token in a request of its own, shape `(rows, ROW)`.
        group: 0 for the image and the text around it, 1, 2, ... for the questions, and -1 for padding, shape
            `(rows, ROW)`.
        tasks: For each row, the tasks of groups 1, 2, ...
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    group: torch.Tensor
    tasks: list[list[str]]

    def to(self, device: str) -> "Batch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "tasks"}
        return replace(self, **tensors)

    def mask(self) -> torch.Tensor:
        """Whether each token attends to each other token, shape `(rows, 1, ROW, ROW)`."""
        of, to = self.group[:, :, None], self.group[:, None, :]
        return ((of == to) | (to == 0)).tril()[:, None]


class Packer:
    """Makes batches of the scenes of a split.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, split: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.split, self.tokenizer = split, tokenizer
        image_token = tokenizer.convert_tokens_to_ids("<image>")
        self.prefix: list[int] = []
        for token in tokenizer.encode(PICTURE_PART):
            self.prefix += [token] * (VISUAL_TOKENS if token == image_token else 1)

    def batches(self, rows: int, start: int = 0) -> Iterator[Batch]:
        """Yields batches without end.

        Args:
            rows: The number of rows of a batch.
            start: The number of the first batch. A batch of the same number is always the same.
        """
        number = start
        while True:
            yield self._batch([Random(f"{self.split} {number * rows + row}") for row in range(rows)])
            number += 1

    def _batch(self, rngs: list[Random]) -> Batch:
        shape = (len(rngs), ROW)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, group = np.full(shape, IGNORE, np.int64), np.full(shape, -1, np.int64)
        weights = np.zeros(shape, np.float32)
        pixels: list[np.ndarray] = []
        tasks: list[list[str]] = []
        for row, rng in enumerate(rngs):
            scene = Scene.random(rng)
            pixels.append(np.asarray(scene.draw(rng)))
            end = len(self.prefix)
            ids[row, :end], positions[row, :end], group[row, :end] = self.prefix, range(end), 0
            tasks.append([])
            for question in questions(scene, rng):
                asked = self.tokenizer.encode(question_part(question.text))
                answer = self.tokenizer.encode(f" {question.answer}</s>")
                tokens = asked + answer
                if end + len(tokens) > ROW:
                    break
                here = slice(end, end + len(tokens))
                tasks[-1].append(question.task)
                ids[row, here] = tokens
                positions[row, here] = range(len(self.prefix), len(self.prefix) + len(tokens))
                group[row, here] = len(tasks[-1])
                predicting = slice(end + len(asked) - 1, here.stop - 1)
                targets[row, predicting], weights[row, predicting] = answer, len(answer) ** -0.5
                end = here.stop
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)),
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            group=torch.from_numpy(group),
            tasks=tasks,
        )


def questions(scene: Scene, rng: Random) -> Iterator[Question]:
    """Yields questions about a scene. All tasks, also the auxiliary ones, take turns in a random order.

    No question comes twice. A scene has more questions than fit into a row, so the caller has to stop:
    after the last new question, this would not end.
    """
    every, asked = [*TASKS, *AUXILIARY_TASKS], set()
    while True:
        for task in rng.sample(every, len(every)):
            question = ask(task, scene, rng)
            if question and question not in asked:
                asked.add(question)
                yield question
