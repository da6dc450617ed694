# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Two criteria that choose the withdrawal layer K.

The *first-token criterion* is the published one (VTW, arXiv 2405.05803). It takes the mean over samples of
KL(P_withdrawn || P_full) at the answer's first token, and chooses the first layer from 5 on where this mean
is at most eta. It does not see what withdrawal does to the rest of an answer.

The *answer criterion* is this project's own. Both models read the full model's answer, and the criterion
compares them at every token: by the mean of KL(P_full || P_withdrawn), and by the share of tokens in whose
place the withdrawn model would have chosen another one. It chooses the first layer where both are within
budget on every task.
"""

from vllm_vtw.config import VICUNA_VOCABULARY, ModelShape
from vllm_vtw.search.divergence import TaskDivergence

FIRST_LAYER_TRIED = 5
"""The first K that the first-token criterion considers."""
# The eta values of arXiv 2405.05803, by (model type, text model type, decoder layers, hidden size). All of
# these models have Vicuna as their text model.
PUBLISHED_ETA = {
    ("llava", "llama", 32, 4096): 0.003,
    ("llava", "llama", 40, 5120): 0.0005,
    ("llava_next", "llama", 32, 4096): 0.0001,
}
OTHER_ETA = 0.003


def default_eta(model: ModelShape, vocabulary: int) -> float:
    """The published eta for a model, in nats. Models without one of their own get `OTHER_ETA`.

    Args:
        model: The shape of the model.
        vocabulary: The number of tokens in the text model's vocabulary.
    """
    shape = (model.model_type, model.text_model_type, model.num_hidden_layers, model.hidden_size)
    return PUBLISHED_ETA.get(shape, OTHER_ETA) if vocabulary in VICUNA_VOCABULARY else OTHER_ETA


def first_token_layers(mean_kl: dict[int, float], eta: float) -> list[int]:
    """The values of K, ascending, that satisfy the first-token criterion. It chooses the first of them.

    Args:
        mean_kl: For each K, ascending, the mean of `AnswerDivergence.first_token_kl` over all samples.
        eta: The largest mean that is allowed, in nats.
    """
    return [layer for layer, kl in mean_kl.items() if layer >= FIRST_LAYER_TRIED and kl <= eta]


def answer_layers(
    curves: dict[str, dict[int, TaskDivergence]], max_answer_kl: float, max_token_change: float
) -> list[int]:
    """The values of K, ascending, that satisfy the answer criterion. It chooses the first of them.

    Args:
        curves: For each task and each K, ascending, how withdrawal changes the answers. All tasks have the
            same values of K.
        max_answer_kl: The largest `TaskDivergence.mean_kl` that is allowed, in nats.
        max_token_change: The largest `TaskDivergence.token_change` that is allowed, from 0 to 1.
    """
    layers = next(iter(curves.values()))
    return [
        layer
        for layer in layers
        if all(by_layer[layer].within(max_answer_kl, max_token_change) for by_layer in curves.values())
    ]
