"""The states of a step's tokens: gathered where a stage begins, scattered back where a pipeline rank ends."""

from dataclasses import dataclass

import torch
from torch import nn

from vllm_vtw.worker.stage_step import StageStep


@dataclass
class TokenStates:
    """The states of the tokens that the current stage of a decoder computes.

    A batch of five tokens whose second and third are visual has five rows in stage 0. `gather` leaves rows
    0, 3 and 4 for stage 1; `scatter` returns to five rows.

    Attributes:
        hidden: Hidden states, shape `(kept, hidden_size)`.
        residual: The residual stream, same shape. None before layer 0 and after the final norm.
        kept: Indices of these tokens in the batch, shape `(kept,)`. None where every token is computed.
        exit_states: For every token of the batch, `hidden + residual` when it left, shape
            `(tokens, hidden_size)`. None as long as nothing has left, or where nothing reads these states.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None
    kept: torch.Tensor | None = None
    exit_states: torch.Tensor | None = None

    def gather(self, step: StageStep | None, keep_exit_states: bool) -> None:
        """Keeps the tokens that a stage computes.

        Args:
            step: The stage's plan. None where it computes every token.
            keep_exit_states: Whether `exit_states` are needed.
        """
        if step is None or step.kept is None:
            return
        index = step.kept if self.kept is None else step.gather
        if index is None:
            return
        assert self.residual is not None, "stage 0 computes every token"
        if keep_exit_states:
            states = self.hidden + self.residual
            if self.kept is not None and self.exit_states is not None:
                states = self.exit_states.index_copy_(0, self.kept, states)
            self.exit_states = states
        self.hidden, self.residual = self.hidden[index], self.residual[index]
        self.kept = step.kept

    def scatter(self, num_tokens: int, norm: nn.Module | None) -> None:
        """Puts the tokens back into the batch's rows.

        The row of a withdrawn token holds its exit state, after `norm`, where exit states were kept, and
        zeros elsewhere. Nothing is sampled from it.

        Args:
            num_tokens: Tokens of the batch.
            norm: The final norm, where the hidden states have been through it.
        """
        if self.kept is None:
            return
        zeros = self.hidden.new_zeros(num_tokens, self.hidden.shape[1])
        if self.residual is not None:
            self.residual = zeros.index_copy(0, self.kept, self.residual)
        if self.exit_states is not None:
            zeros = self.exit_states if norm is None else norm(self.exit_states)
        self.hidden = zeros.index_copy_(0, self.kept, self.hidden)
        self.kept = None
