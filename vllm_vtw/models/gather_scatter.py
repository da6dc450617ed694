# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The hidden states of a step's tokens, gathered before each stage and scattered back at the end."""

from dataclasses import dataclass

import torch
from torch import nn

from vllm_vtw.worker.stage_step import StageStep


@dataclass
class TokenStates:
    """The states of the tokens that the current stage of a decoder computes.

    For example, a batch of five tokens whose tokens 1 and 2 are visual has five rows in stage 0. `gather`
    keeps rows 0, 3 and 4 for stage 1, and `scatter` makes five rows of them again.

    Attributes:
        hidden: Hidden states, shape `(kept, hidden_size)`.
        residual: The residual stream, same shape. None before layer 0 and after the final norm.
        kept: Indices of these tokens in the batch, shape `(kept,)`. None if they are all tokens of the
            batch.
        withdrawn_states: For each token of the batch, the sum of its hidden state and residual when it was
            withdrawn, shape `(tokens, hidden_size)`. Only the rows of withdrawn tokens are used. None if no
            token has been withdrawn, or if nothing reads these states.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None
    kept: torch.Tensor | None = None
    withdrawn_states: torch.Tensor | None = None

    def gather(self, step: StageStep | None, keep_withdrawn_states: bool) -> None:
        """Keeps the tokens that a stage computes.

        Args:
            step: What the step computes in the stage. None if it computes all tokens.
            keep_withdrawn_states: Whether to keep the states of withdrawn tokens in `withdrawn_states`.
        """
        if step is None or step.kept is None:
            return
        index = step.kept if self.kept is None else step.gather
        if index is None:
            return
        if keep_withdrawn_states:
            states = self.hidden.clone() if self.residual is None else self.hidden + self.residual
            if self.kept is not None and self.withdrawn_states is not None:
                states = self.withdrawn_states.index_copy_(0, self.kept, states)
            self.withdrawn_states = states
        self.hidden = self.hidden[index]
        self.residual = None if self.residual is None else self.residual[index]
        self.kept = step.kept

    def of_batch(self, states: torch.Tensor) -> torch.Tensor:
        """Adds those of withdrawn tokens, which have to be kept, to states of the current stage's tokens.

        Args:
            states: Shape `(kept, hidden_size)`.

        Returns:
            States of all tokens, shape `(tokens, hidden_size)`. A withdrawn token has that in which it left.
        """
        if self.kept is None:
            return states
        assert self.withdrawn_states is not None
        return self.withdrawn_states.index_copy(0, self.kept, states)

    def scatter(self, num_tokens: int, norm: nn.Module | None) -> None:
        """Puts the tokens back into the rows of the batch.

        If `withdrawn_states` were kept, the row of a withdrawn token gets its state, after `norm`. Otherwise
        it gets zeros. Nothing is sampled from these rows.

        Args:
            num_tokens: The number of tokens of the batch.
            norm: The final norm, if it has been applied to the hidden states. None if not.
        """
        if self.kept is None:
            return
        zeros = self.hidden.new_zeros(num_tokens, self.hidden.shape[1])
        if self.residual is not None:
            self.residual = zeros.index_copy(0, self.kept, self.residual)
        if self.withdrawn_states is not None:
            zeros = self.withdrawn_states if norm is None else norm(self.withdrawn_states)
        self.hidden = zeros.index_copy_(0, self.kept, self.hidden)
        self.kept = None
