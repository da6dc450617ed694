# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Checkpoints in the formats of quantized weights, and references that round what such a model rounds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from tests.engine.reference import Reference

_GROUP = 32
"""How many inputs of a row of weights share a scale in the formats of 4 bits."""


class _Rounded(nn.Module):
    """A linear layer of weights, shape `(out, in)`, that were rounded, and of inputs that it rounds."""

    def __init__(self, weight: torch.Tensor, inputs: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.inputs = weight, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inputs(x) @ self.weight.T


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores the linear layers of a decoder.

    Attributes:
        config: The checkpoint's `"quantization_config"`.
        store: From weights, shape `(out, in)`, to the tensors of a layer by name and to the rounded weights.
        inputs: Rounds the inputs of a layer, shape `(..., in)`.
    """

    config: Mapping[str, Any]
    store: Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
    inputs: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def save(self, source: Path, folder: Path) -> Reference:
        """Writes the checkpoint of `source` in this format to `folder`, and returns its reference."""
        folder.mkdir()
        for file in source.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": self.config}))
        oracle, tensors = Reference(source), {}
        layers = oracle.model.model.language_model.layers
        for name, tensor in load_file(source / "model.safetensors").items():
            if "language_model" not in name or not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            stored, rounded = self.store(tensor)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": value.contiguous() for part, value in stored.items()}
            layers.set_submodule(layer.split(".layers.")[1], _Rounded(rounded, self.inputs))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return oracle


def _packed(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of 4 bits along the last axis in an int32, the one of `order[i]` in the bits from 4 i."""
    groups = numbers.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    words = (groups << torch.arange(0, 32, 4)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32)


def _awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = weight.unflatten(1, (-1, _GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": _packed(numbers.flatten(1).T, order),
        "qzeros": _packed(zeros.T, order),
        "scales": scales.T.half(),
    }
    return stored, ((numbers - zeros[..., None]) * scales[..., None]).flatten(1)


def _gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = weight.unflatten(1, (-1, _GROUP))
    scales = (groups.abs().amax(-1) / 7).half().float()
    numbers = (groups / scales[..., None]).round().clamp(-8, 7)
    stored = {
        "qweight": _packed(numbers.flatten(1) + 8).T,
        "qzeros": _packed(torch.full_like(scales, 7).T),
        "scales": scales.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // _GROUP,
    }
    return stored, (numbers * scales[..., None]).flatten(1)


def _int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def _to_int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def _to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    return stored, _to_fp8(weight, scale)


def _inputs_to_fp8(x: torch.Tensor) -> torch.Tensor:
    return _to_fp8(x, x.abs().amax(-1, keepdim=True) / 448)


UNQUANTIZED = ["vision_tower", "multi_modal_projector", "lm_head"]
"""Parts of a checkpoint that stay as they are."""


def _compressed(numbers: str, layout: str) -> dict[str, Any]:
    """A configuration with a scale for each row of weights and, at run time, for each token."""
    eight_bits = {"num_bits": 8, "type": numbers, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": [f"re:.*{name}.*" for name in UNQUANTIZED],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
            }
        },
    }


FORMATS = {
    "int8": Format(_compressed("int", "int-quantized"), _int8, _to_int8),
    "fp8": Format(_compressed("float", "float-quantized"), _fp8, _inputs_to_fp8),
    "awq": Format(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": UNQUANTIZED,
        },
        _awq,
    ),
    "gptq": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True}, _gptq
    ),
}
"""Weights of 8 bits as compressed-tensors stores them, and the formats of 4 bits."""


def with_fp8_cache(folder: Path) -> Reference:
    """A reference whose attention reads keys and values as a KV cache of fp8 holds them."""
    AttentionInterface.register("rounded_cache", _rounded_cache)
    oracle = Reference(folder)
    oracle.model.set_attn_implementation({"text_config": "rounded_cache"})
    return oracle


def _rounded_cache(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return eager_attention_forward(module, query, _in_cache(key), _in_cache(value), *args, **options)


def _in_cache(x: torch.Tensor) -> torch.Tensor:
    """As vLLM's kernel for the CPU stores it: it rounds to zero, not to the nearest number."""
    nearest = x.to(torch.float8_e4m3fn)
    too_far = (nearest.float().abs() > x.abs()).to(torch.uint8)
    return (nearest.view(torch.uint8) - too_far).view(torch.float8_e4m3fn).float()
