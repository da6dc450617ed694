# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plainest baseline: the same pictures at a lower resolution, which have fewer visual tokens."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from vllm_vtw.policy import BY_QUESTION
from vllm_vtw.search.data.sample import BadSampleError, Sample
from vllm_vtw.search.layerwise import LayerInput
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.schedules.gsearch import least_sufficient
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

STEPS = 32
"""The factors by which pictures are made smaller are multiples of 1 / `STEPS`."""


class Resolution(NamedTuple):
    """How much smaller pictures are made.

    Attributes:
        scale: The factor of width and height.
        keep: The visual tokens that the model makes of the smaller pictures, as a fraction of those that it
            makes of the pictures as they are.
    """

    scale: float
    keep: float


def affordable_resolution(
    model: HFModel,
    samples: Sequence[Sample],
    visual_tokens: float,
    max_tokens: int,
    affordable: Callable[[float], bool],
) -> Resolution | None:
    """Finds the highest resolution that costs no more than allowed.

    Args:
        model: The model.
        samples: The samples.
        visual_tokens: The mean number of visual tokens of the pictures as they are.
        max_tokens: The most tokens of an answer.
        affordable: Whether a fraction of the visual tokens costs no more than allowed.

    Returns:
        None if the pictures as they are would be affordable, or if no resolution is, as for a model that
        makes the same number of tokens of a picture at any resolution.
    """

    @functools.cache
    def keep(steps_less: int) -> float | None:
        """The fraction of visual tokens at a scale of 1 less some steps. None if a picture is refused."""
        scale, tokens = 1 - steps_less / STEPS, 0
        try:
            for sample in samples:
                tokens += int(model.prompts.inputs(sample, max_tokens, scale).is_visual[:-1].sum())
        except BadSampleError:
            return None
        return tokens / len(samples) / visual_tokens

    # Models refuse pictures that are too small.
    most = least_sufficient(STEPS - 1, lambda steps: steps == STEPS - 1 or keep(steps + 1) is None)
    steps_less = least_sufficient(most, lambda steps: affordable(keep(steps) or 0.0))
    kept = keep(steps_less)
    if steps_less == 0 or kept is None or not affordable(kept):
        return None
    return Resolution(1 - steps_less / STEPS, kept)


def at_resolution(
    model: HFModel, sample: Sample, at_layer: SampleAtLayer, max_tokens: int, scale: float
) -> SampleAtLayer:
    """A sample whose pictures are smaller.

    Args:
        model: The model.
        sample: The sample as the data has it.
        at_layer: The same before layer 0.
        max_tokens: The most tokens of an answer.
        scale: The factor of width and height.

    Returns:
        The sample before layer 0. Its logits are those of the full model about the pictures as they are.
    """
    answered = model.answer(model.encode(sample, max_tokens, scale), max_tokens=1)
    told = model.told(answered, at_layer.tokens)
    return replace(at_layer, rows=LayerInput.of(told, BY_QUESTION[0]))
