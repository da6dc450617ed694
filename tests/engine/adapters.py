# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""LoRA adapters with random weights, and references that have them merged into their own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.ops.torch_ops import lora_ops

from tests.engine.reference import Reference

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter:
    """An adapter of all linear layers of a decoder, so large that it changes most answers.

    Args:
        reference: Of the model that it is for.
        seed: Of its weights.
    """

    def __init__(self, reference: Reference, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.factors = {}
        for name, module in reference.model.named_modules():
            if ".language_model." in name and name.endswith(MODULES):
                down = torch.randn(RANK, module.in_features, generator=rng) * module.in_features**-0.5
                up = torch.randn(module.out_features, RANK, generator=rng) * 0.3
                self.factors[name] = (down, up)

    def save(self, folder: Path) -> Path:
        """Writes it as PEFT does."""
        folder.mkdir()
        tensors = {}
        for name, (down, up) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*MODULES]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def merged(self, folder: Path) -> Reference:
        """A reference of the checkpoint in `folder` whose weights have the adapter's product added."""
        reference = Reference(folder)
        with torch.no_grad():
            for name, (down, up) in self.factors.items():
                reference.model.get_submodule(name).weight += ALPHA / RANK * up @ down
        return reference


@pytest.fixture
def rows_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends vLLM's LoRA kernels for the CPU, in which rows without an adapter have that of the last slot."""
    original = lora_ops.bgmv_shrink

    def shrink(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        adapters: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, weights, output, adapters, scaling)
        output[adapters < 0] = 0

    monkeypatch.setattr(lora_ops, "bgmv_shrink", shrink)
