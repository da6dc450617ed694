# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How much answers under withdrawal differ from the full model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AnswerDivergence:
    """How withdrawal at one K changes one answer of the full model.

    Both models read the same tokens, the answer of the full model, so they can be compared token by token.

    Attributes:
        first_token_kl: KL(P_withdrawn || P_full) at the answer's first token, in nats. VTW's published
            criterion (arXiv 2405.05803) looks at nothing else.
        answer_kl: KL(P_full || P_withdrawn) at each token of the answer, in nats.
        changed: For each token of the answer, whether the withdrawn model's most likely token differs from
            the full model's.
    """

    first_token_kl: float
    answer_kl: list[float]
    changed: list[bool]

    @classmethod
    def between(cls, full: "torch.Tensor", withdrawn: "torch.Tensor") -> "AnswerDivergence":
        """Computes the difference from the logits of an answer of O tokens.

        Args:
            full: The full model's logits, shape `(O, vocabulary)`.
            withdrawn: The logits without visual tokens, shape `(O, vocabulary)`.
        """
        from torch.nn.functional import kl_div

        full_log, withdrawn_log = full.log_softmax(-1), withdrawn.log_softmax(-1)
        first = kl_div(full_log[0], withdrawn_log[0], reduction="sum", log_target=True)
        all_kl = kl_div(withdrawn_log, full_log, reduction="none", log_target=True).sum(-1)
        changed = full.argmax(-1) != withdrawn.argmax(-1)
        return cls(first.item(), all_kl.tolist(), changed.tolist())


@dataclass(frozen=True)
class TaskDivergence:
    """How withdrawal changes the answers of one task, at one K: one point of the task's curve over K.

    Means and percentiles are over the tokens of all answers together, so long answers count for more.

    Attributes:
        mean_kl: The mean of KL(P_full || P_withdrawn) over tokens, in nats.
        p95_kl: The 95th percentile of the same KL over tokens, in nats.
        token_change: The share of tokens, from 0 to 1, in whose place the withdrawn model would have chosen
            another one.
        answer_change: The share of answers, from 0 to 1, with at least one such token. Greedy decoding with
            withdrawal would not give these answers again.
    """

    mean_kl: float
    p95_kl: float
    token_change: float
    answer_change: float

    @classmethod
    def of(cls, answers: Sequence[AnswerDivergence]) -> "TaskDivergence":
        """Summarizes the differences of a task's answers, of which there has to be at least one."""
        kls = np.concatenate([answer.answer_kl for answer in answers])
        changed = np.concatenate([answer.changed for answer in answers])
        return cls(
            mean_kl=float(kls.mean()),
            p95_kl=float(np.percentile(kls, 95)),
            token_change=float(changed.mean()),
            answer_change=float(np.mean([any(answer.changed) for answer in answers])),
        )

    def within(self, max_answer_kl: float, max_token_change: float) -> bool:
        """Whether `mean_kl` and `token_change` are at most as large as allowed."""
        return self.mean_kl <= max_answer_kl and self.token_change <= max_token_change
