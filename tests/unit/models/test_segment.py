# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a segment shows of the states between its layers."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vllm_vtw.models import segment


class InPlace(nn.Module):
    """A layer that, as vLLM's do with fused kernels, adds to the residual in place."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else residual
        residual += 1
        return torch.full_like(hidden, 10.0), residual


def test_states_before_the_last_layer(monkeypatch):
    monkeypatch.setattr(segment, "attention_of", lambda layer: SimpleNamespace(layer_name=""))
    text_model = SimpleNamespace(layers=[InPlace(), InPlace()])
    hidden, config = torch.rand(3, 4), Any
    for layers, expected in ((range(1), hidden), (range(2), hidden + 11)):
        made: Any = segment.Segment(vllm_config=config, text_model=text_model, layers=layers, has_norm=False)
        made.shows_before_last = True
        _, _, (before,) = made(torch.arange(3), hidden.clone(), None)
        assert before.allclose(expected)
