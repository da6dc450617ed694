# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The base class of rankings."""

from abc import ABC, abstractmethod

import torch


class Ranking(ABC):
    """Scores the tokens of a prompt. The visual tokens with the highest scores stay."""

    @abstractmethod
    def score(self, query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores the tokens of one prompt, given queries and keys of the layer before a stage.

        Under tensor parallelism each rank calls this with its own heads, and the scores of all ranks are
        added up.

        Args:
            query: Query of the prompt's last token, after the rotary embedding, shape `(heads, head_size)`.
            keys: Keys of all tokens of the prompt that the layer holds, after the rotary embedding, shape
                `(tokens, kv_heads, head_size)`.
            scale: Factor by which attention multiplies the dot products of queries and keys.

        Returns:
            The score of each token, float32, shape `(tokens,)`. Only the scores of visual tokens are used.
        """
