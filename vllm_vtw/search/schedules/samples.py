"""What a schedule does to the answers of the full model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from vllm_vtw.policy import Stage
from vllm_vtw.search.divergence import Curve, Difference
from vllm_vtw.search.model import FullAnswer, HFModel
from vllm_vtw.search.schedules.layerwise import LayerInput, answer_logits, run_layer


@dataclass(frozen=True)
class SampleAtLayer:
    """A sample, as the full model answers it, at some layer of a schedule.

    Attributes:
        task: Its label.
        visual_tokens: Of the prompt, without its last token.
        logits: The full model's, of the answer, shape `(O, vocabulary)`, on the CPU. From the same pass as a
            schedule's: those of token by token differ by rounding.
        rows: What the layer gets.
    """

    task: str
    visual_tokens: int
    logits: torch.Tensor
    rows: LayerInput

    @classmethod
    def of(cls, model: HFModel, task: str, answered: FullAnswer) -> "SampleAtLayer":
        """Before layer 0."""
        asked = cls(task, answered.visual_tokens, answered.logits, LayerInput.of(answered))
        full = asked.going_on(model, 0, [1.0] * len(model.decoder.layers))
        return replace(asked, logits=answer_logits(model, full.rows).cpu())

    def going_on(self, model: HFModel, layer: int, keeps: Sequence[float]) -> "SampleAtLayer":
        """Through the layers from `layer` on, of which each gets the fraction of `keeps`.

        The last of them ranks for what follows; the others only where the next one gets less.
        """
        rows = self.rows
        counts = [Stage(index, keep).kept(self.visual_tokens) for index, keep in enumerate(keeps, layer)]
        for index, (count, following) in enumerate(pairwise([*counts, -1]), layer):
            rows = run_layer(model, index, rows.withdrawn(count), ranks=following < count)
        return replace(self, rows=rows)

    def difference(self, model: HFModel) -> Difference:
        """Behind the last layer: from the full model's answer."""
        logits = answer_logits(model, self.rows)
        return Difference.between(self.logits.to(logits.device), logits)


def divergence_by_task(
    model: HFModel, asked: Iterable[SampleAtLayer], layer: int, keep: Sequence[float]
) -> dict[str, Curve]:
    """By task, how answers differ where the layers from `layer` on get the fractions of `keep`."""
    by_task: dict[str, list[Difference]] = {}
    for one in asked:
        difference = one.going_on(model, layer, keep).difference(model)
        by_task.setdefault(one.task, []).append(difference)
    return {task: Curve.of(differences) for task, differences in by_task.items()}
