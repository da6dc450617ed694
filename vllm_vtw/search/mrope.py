# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Lets transformers count M-RoPE's positions as vLLM does."""

from typing import Any

import torch


def count_as_in_vllm(model: Any, visual_ids: torch.Tensor) -> None:
    """Lets text after an image or a video go on from the largest position so far.

    vLLM and the published code of Qwen2-VL and Qwen2.5-VL count so. transformers 5.19 goes on from the
    largest position in height and width, which is less than the largest in time after a long video. Where
    both are the same, nothing changes.

    Args:
        model: The transformers model whose `get_rope_index` makes the positions. It is modified.
        visual_ids: The ids of visual tokens.
    """
    original = model.get_rope_index

    def get_rope_index(input_ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions, deltas = original(input_ids, **options)
        is_visual = torch.isin(input_ids[0], visual_ids.to(input_ids.device))
        first_texts = (is_visual[:-1] & ~is_visual[1:]).nonzero()[:, 0] + 1
        for first in first_texts.tolist():
            positions[..., first:] += positions[..., :first].max() + 1 - positions[0, 0, first]
        return positions, torch.full_like(deltas, int(positions.max()) + 1 - input_ids.shape[1])

    model.get_rope_index = get_rope_index
