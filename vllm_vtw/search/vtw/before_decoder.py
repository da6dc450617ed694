# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Withdraws a share of each image's visual tokens before the decoder, for a calibration of what follows."""

from dataclasses import replace

import torch

from vllm_vtw.search.layerwise import LayerInput, answer_logits, run_layer
from vllm_vtw.search.model import FullAnswer, HFModel


def with_fewer_tokens(
    model: HFModel, answered: FullAnswer, ranking: str, keep: float
) -> tuple[FullAnswer, torch.Tensor]:
    """Reads the full model's answer after some visual tokens have left before layer 0.

    Args:
        model: The model.
        answered: The full model's answer.
        ranking: The name of a ranking by image.
        keep: The share of each image's visual tokens that stays.

    Returns:
        The answer, with the states that text tokens then have in every layer, and the logits from which its
        tokens would be chosen, shape `(O, vocabulary)`, float32.
    """
    everything = LayerInput.of(answered, ranking)
    rows, states = everything.withdraw(keep), []
    for index in range(len(model.decoder.layers)):
        states.append(rows.hidden[~rows.is_candidate])
        rows = run_layer(model, index, rows, ranks=False)
    # Under a ranking by features, the first token of an image may have to stay.
    return replace(answered, states=states, is_visual=everything.is_candidate), answer_logits(model, rows)
