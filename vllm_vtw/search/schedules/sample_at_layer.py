# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures how a schedule changes the answers of the full model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from vllm_vtw.policy import BY_QUESTION
from vllm_vtw.search.divergence import AnswerDivergence, TaskDivergence
from vllm_vtw.search.layerwise import LayerInput, answer_logits, run_layer
from vllm_vtw.search.model import FullAnswer, HFModel


@dataclass(frozen=True)
class SampleAtLayer:
    """A sample with the full model's answer, which a schedule was applied to up to some layer.

    Attributes:
        task: The sample's task label.
        tokens: The token ids of the full model's answer.
        logits: The full model's logits for the O tokens of the answer, shape `(O, vocabulary)`, on the CPU.
            Like those of a schedule, they come from one pass over prompt and answer. Logits from decoding
            token by token would differ by rounding.
        rows: The tokens that the next layer gets.
    """

    task: str
    tokens: list[int]
    logits: torch.Tensor
    rows: LayerInput

    @classmethod
    def of(
        cls, model: HFModel, task: str, answered: FullAnswer, ranking: str = BY_QUESTION[0]
    ) -> "SampleAtLayer":
        """Makes the sample before layer 0 from the full model's answer."""
        sample = cls(task, answered.tokens, answered.logits, LayerInput.of(answered, ranking))
        full = sample.run_layers(model, 0, [1.0] * len(model.decoder.layers))
        return replace(sample, logits=answer_logits(model, full.rows).cpu())

    def ranked_by(self, ranking: str) -> "SampleAtLayer":
        """The same sample before layer 0, under another ranking."""
        if ranking == self.rows.ranking:
            return self
        return replace(self, rows=self.rows.ranked_by(ranking))

    def run_layers(self, model: HFModel, layer: int, keeps: Sequence[float]) -> "SampleAtLayer":
        """Applies a schedule to the next layers.

        Under a ranking by question, scores are computed in layers before one that gets fewer visual tokens,
        and in the last of these layers, because the one after it may get fewer.

        Args:
            model: The model.
            layer: The next layer.
            keeps: The fractions of visual tokens that `layer` and the layers after it get.

        Returns:
            The sample after the last of these layers.
        """
        rows = self.rows
        for index, (keep, following) in enumerate(pairwise([*keeps, -1]), layer):
            rows = run_layer(model, index, rows.withdraw(keep), ranks=following < keep)
        return replace(self, rows=rows)

    def difference(self, model: HFModel) -> AnswerDivergence:
        """How the schedule changed the full model's answer, for a sample after the last layer."""
        logits = answer_logits(model, self.rows)
        return AnswerDivergence.between(self.logits.to(logits.device), logits)


def divergence_by_task(
    model: HFModel, samples: Iterable[SampleAtLayer], layer: int, keeps: Sequence[float]
) -> dict[str, TaskDivergence]:
    """Measures by task how a schedule for the remaining layers changes the answers.

    Args:
        model: The model.
        samples: The samples, before `layer`.
        layer: The first of the remaining layers.
        keeps: The fraction of visual tokens that each of the remaining layers gets.
    """
    by_task: dict[str, list[AnswerDivergence]] = {}
    for sample in samples:
        difference = sample.run_layers(model, layer, keeps).difference(model)
        by_task.setdefault(sample.task, []).append(difference)
    return {task: TaskDivergence.of(differences) for task, differences in by_task.items()}
