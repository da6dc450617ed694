"""How far answers under withdrawal are from those of the full model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


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
