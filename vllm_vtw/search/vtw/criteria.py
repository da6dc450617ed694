"""Two criteria for the withdrawal layer K.

The *first-token criterion* is the published one (VTW, arXiv 2405.05803): KL(P_withdrawn || P_full) of an
answer's first token, mean over samples, K the first layer from 5 on where it is at most eta. It does not see
what withdrawal does to the rest of an answer.

The *answer criterion* looks at every token of the full model's answer, read by both: the mean of
KL(P_full || P_withdrawn) and the share of tokens that the withdrawn model would have chosen otherwise. K is
the first layer where both are within budget on the worst task.
"""

from vllm_vtw.config import ModelShape
from vllm_vtw.search.divergence import Curve

FIRST_LAYER = 5
# Of arXiv 2405.05803, by (model type, text model type, decoder layers, hidden size), all of them over Vicuna.
PUBLISHED_ETA = {
    ("llava", "llama", 32, 4096): 0.003,
    ("llava", "llama", 40, 5120): 0.0005,
    ("llava_next", "llama", 32, 4096): 0.0001,
}
VICUNA_VOCABULARY = range(32000, 32065)
OTHER_ETA = 0.003


def default_eta(model: ModelShape, vocabulary: int) -> float:
    """The published bound for a model, or that for all others."""
    shape = (model.model_type, model.text_model_type, model.num_hidden_layers, model.hidden_size)
    return PUBLISHED_ETA.get(shape, OTHER_ETA) if vocabulary in VICUNA_VOCABULARY else OTHER_ETA


def first_token_layer(mean_kl: dict[int, float], eta: float) -> int | None:
    """The first K from 5 on with a mean of at most `eta`, None where there is none.

    Args:
        mean_kl: By K, ascending: `Difference.first_token_kl`, mean over all samples.
        eta: In nats.
    """
    return next((layer for layer, kl in mean_kl.items() if layer >= FIRST_LAYER and kl <= eta), None)


def answer_layer(
    curves: dict[str, dict[int, Curve]], max_answer_kl: float, max_token_change: float
) -> int | None:
    """The first K where every task is within budget, None where there is none.

    Args:
        curves: By task and K, ascending.
        max_answer_kl: Of `Curve.mean_kl`.
        max_token_change: Of `Curve.token_change`.
    """
    layers = next(iter(curves.values()))
    return next(
        (
            layer
            for layer in layers
            if all(by_layer[layer].within(max_answer_kl, max_token_change) for by_layer in curves.values())
        ),
        None,
    )
