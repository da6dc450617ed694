"""Two criteria for the withdrawal layer K.

The *first-token criterion* is the published one (VTW, arXiv 2405.05803): KL(P_withdrawn || P_full) of an
answer's first token, mean over samples, K the first layer from 5 on where it is at most eta. It does not see
what withdrawal does to the rest of an answer.

The *answer criterion* looks at every token of the full model's answer, read by both: the mean of
KL(P_full || P_withdrawn) and the share of tokens that the withdrawn model would have chosen otherwise. K is
the first layer where both are within budget on the worst task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_vtw.config import Model

if TYPE_CHECKING:
    import torch

FIRST_LAYER = 5
# Of arXiv 2405.05803, by (model type, text model type, decoder layers, hidden size), all of them over Vicuna.
PUBLISHED_ETA = {
    ("llava", "llama", 32, 4096): 0.003,
    ("llava", "llama", 40, 5120): 0.0005,
    ("llava_next", "llama", 32, 4096): 0.0001,
}
VICUNA_VOCABULARY = range(32000, 32065)
OTHER_ETA = 0.003


def default_eta(model: Model, vocabulary: int) -> float:
    """The published bound for a model, or that for all others."""
    shape = (model.model_type, model.text_model_type, model.num_hidden_layers, model.hidden_size)
    return PUBLISHED_ETA.get(shape, OTHER_ETA) if vocabulary in VICUNA_VOCABULARY else OTHER_ETA


@dataclass(frozen=True)
class Difference:
    """What withdrawal at one K does to one answer of O tokens.

    Attributes:
        first_token_kl: KL(P_withdrawn || P_full) of the first token, in nats.
        answer_kl: KL(P_full || P_withdrawn) of each token, in nats.
        changed: For each token, whether the withdrawn model's likeliest is another.
    """

    first_token_kl: float
    answer_kl: list[float]
    changed: list[bool]

    @classmethod
    def between(cls, full: "torch.Tensor", withdrawn: "torch.Tensor") -> "Difference":
        """Of logits, shape `(O, vocabulary)` each."""
        from torch.nn.functional import kl_div

        full_log, withdrawn_log = full.log_softmax(-1), withdrawn.log_softmax(-1)
        first = kl_div(full_log[0], withdrawn_log[0], reduction="sum", log_target=True)
        every = kl_div(withdrawn_log, full_log, reduction="none", log_target=True).sum(-1)
        changed = full.argmax(-1) != withdrawn.argmax(-1)
        return cls(first.item(), every.tolist(), changed.tolist())


@dataclass(frozen=True)
class Curve:
    """One task's answers at one K, pooled.

    Attributes:
        mean_kl: KL(P_full || P_withdrawn), mean over tokens, in nats.
        p95_kl: Its 95th percentile over tokens.
        token_change: The share of tokens that the withdrawn model would choose otherwise.
        answer_change: The share of answers with such a token: greedy decoding would not give them again.
    """

    mean_kl: float
    p95_kl: float
    token_change: float
    answer_change: float

    @classmethod
    def of(cls, answers: Sequence[Difference]) -> "Curve":
        kls = np.concatenate([answer.answer_kl for answer in answers])
        changed = np.concatenate([answer.changed for answer in answers])
        return cls(
            mean_kl=float(kls.mean()),
            p95_kl=float(np.percentile(kls, 95)),
            token_change=float(changed.mean()),
            answer_change=float(np.mean([any(answer.changed) for answer in answers])),
        )

    def within(self, max_answer_kl: float, max_token_change: float) -> bool:
        return self.mean_kl <= max_answer_kl and self.token_change <= max_token_change


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
