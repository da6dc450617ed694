"""What every ranking has in common."""

from abc import ABC, abstractmethod

import torch


class Ranking(ABC):
    """Scores the tokens of a prompt. Of the visual ones, those with the highest scores stay."""

    @abstractmethod
    def score(self, query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores every token of one prompt, in the attention of the layer before a stage.

        Under tensor parallelism every rank calls it with its own heads, and the scores of all ranks are
        added up.

        Args:
            query: Of the prompt's last token, after the rotary embedding, shape `(heads, head_size)`.
            keys: Of all tokens of the prompt that the layer holds, after the rotary embedding, shape
                `(tokens, kv_heads, head_size)`.
            scale: What attention multiplies the products of queries and keys by.

        Returns:
            Scores, shape `(tokens,)`, float32. Only those of visual tokens are compared.
        """
