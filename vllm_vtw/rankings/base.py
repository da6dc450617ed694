# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The base classes of rankings."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch  # the process that schedules needs only rankings of images


class AttentionRanking(ABC):
    """Scores the tokens of a prompt by queries and keys. The visual tokens with the highest scores stay."""

    @abstractmethod
    def score(self, query: "torch.Tensor", keys: "torch.Tensor", scale: float) -> "torch.Tensor":
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


class StateRanking(ABC):
    """Scores tokens by their states. The visual tokens with the highest scores stay."""

    @abstractmethod
    def score(self, before: "torch.Tensor", after: "torch.Tensor") -> "torch.Tensor":
        """Scores tokens, given their states before and after the last layer before a stage.

        Args:
            before: Shape `(tokens, hidden_size)`.
            after: Same shape.

        Returns:
            The score of each token, float32, shape `(tokens,)`. Only the scores of visual tokens are used.
        """


class ImageRanking(ABC):
    """Orders the visual tokens of one image or video, whatever the question about it. The first ones stay."""

    @abstractmethod
    def order(self, num_tokens: int, image_hash: str) -> npt.NDArray[np.int64]:
        """Orders the tokens of an image.

        Args:
            num_tokens: The number of its visual tokens.
            image_hash: vLLM's hash of the image.

        Returns:
            Their indices, from the one that stays longest to the one that leaves first, shape
            `(num_tokens,)`.
        """


class FeatureRanking(ABC):
    """Orders the tokens of one image or video by what the encoder has computed of them. The first ones stay.

    The result is kept for as long as requests may ask about the same image.
    """

    @abstractmethod
    def order(self, features: "torch.Tensor", count: int) -> "torch.Tensor":
        """Orders the tokens that may stay.

        Args:
            features: What the decoder gets in place of the tokens, shape `(tokens, hidden_size)`.
            count: How many tokens stay at most.

        Returns:
            Their indices, from the one that stays longest on, shape `(count,)`.
        """
