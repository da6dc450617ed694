# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plainest baseline: the same pictures at a lower resolution, which have fewer visual tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from vllm_vtw.search.data.sample import BadSampleError, Sample
from vllm_vtw.search.layerwise import LayerInput
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.schedules.gsearch import least_sufficient
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

STEPS = 32
"""The factors by which pictures are made smaller are multiples of 1 / `STEPS`."""
LEAST = 2
"""The smallest factor, in steps. Models refuse images of a few pixels."""


class Shrunk(NamedTuple):
    """Samples whose pictures are smaller.

    Attributes:
        scale: The factor of width and height.
        keep: The visual tokens that the model makes of the smaller pictures, as a fraction of those that it
            makes of the pictures as they are.
        samples: The samples. Their logits are those of the full model about the pictures as they are.
    """

    scale: float
    keep: float
    samples: list[SampleAtLayer]


def at_lower_resolution(
    model: HFModel,
    samples: Sequence[tuple[Sample, SampleAtLayer]],
    max_tokens: int,
    affordable: Callable[[float], bool],
) -> Shrunk | None:
    """Makes pictures as small as a budget asks for.

    Args:
        model: The model.
        samples: The samples as the data has them, and before layer 0.
        max_tokens: The most tokens of an answer.
        affordable: Whether a fraction of the visual tokens costs no more than allowed.

    Returns:
        The samples with the largest pictures that are affordable. None if the pictures as they are would be,
        or if none are, as for a model that makes the same number of tokens of a picture at any resolution.
    """
    before = sum(at_layer.rows.visual_tokens for _, at_layer in samples)

    def keep(steps_less: int) -> float:
        """The fraction of visual tokens at a scale of 1 less some steps. 1 if a picture is refused."""
        scale = 1 - steps_less / STEPS
        try:
            inputs = [model.prompts.inputs(sample, max_tokens, scale) for sample, _ in samples]
        except BadSampleError:
            return 1.0
        return sum(int(one.is_visual[:-1].sum()) for one in inputs) / before

    most = STEPS - LEAST
    steps_less = least_sufficient(most, lambda steps: affordable(keep(steps)))
    kept = keep(steps_less)
    if steps_less == 0 or not affordable(kept):
        return None
    scale = 1 - steps_less / STEPS
    return Shrunk(scale, kept, [_shrunk(model, *one, max_tokens, scale) for one in samples])


def _shrunk(
    model: HFModel, sample: Sample, at_layer: SampleAtLayer, max_tokens: int, scale: float
) -> SampleAtLayer:
    answered = model.answer(model.encode(sample, max_tokens, scale), max_tokens=1)
    told = model.told(answered, at_layer.tokens)
    return replace(at_layer, rows=LayerInput.of(told, at_layer.rows.ranking))
