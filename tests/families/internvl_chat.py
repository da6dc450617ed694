# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""InternVL checkpoints in the format of the Hub's own code, made from checkpoints in transformers' format."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

# The Hub's checkpoints bring a file like this one. vLLM reads the configuration through it.
CONFIGURATION = """
from transformers import CONFIG_MAPPING, PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **options):
        super().__init__(**options)
        llm = dict(llm_config or {"model_type": "llama"})
        kind = llm.pop("model_type")
        text = InternLM2Config if kind == "internlm2" else CONFIG_MAPPING[kind]
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = text(**llm)
"""
VISION_NAMES = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def rewrite(twin: Path, folder: Path, text_type: str) -> Path:
    """Writes a checkpoint of transformers' format in the Hub's.

    Args:
        twin: The checkpoint in transformers' format.
        folder: Where to write.
        text_type: The text model's type there. `"internlm2"` is made from Llama, which computes the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(twin)
    text, vision = config.text_config.to_dict(), config.vision_config
    architecture = {"internlm2": "InternLM2ForCausalLM", "qwen2": "Qwen2ForCausalLM"}[text_type]
    content: dict[str, Any] = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "llm_config": text | {"model_type": text_type, "architectures": [architecture], "bias": False},
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "qkv_bias": False,
            "qk_normalization": False,
            "initializer_factor": 1.0,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "layer_norm_eps": vision.layer_norm_eps,
        },
        "force_image_size": vision.image_size[0],
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    AutoTokenizer.from_pretrained(twin).save_pretrained(folder)
    tensors = load_file(twin / "model.safetensors")
    heads = config.text_config.num_key_value_heads
    written = dict(_vision(tensors)) | dict(
        _internlm2(tensors, heads) if text_type == "internlm2" else _text(tensors)
    )
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _vision(tensors: dict[str, torch.Tensor]) -> Any:
    for name, tensor in tensors.items():
        fused = re.fullmatch(r"(vision_tower\.encoder\.layer\.\d+\.)attention\.([qkv])_proj\.weight", name)
        if fused and fused[2] == "q":
            parts = [tensors[f"{fused[1]}attention.{one}_proj.weight"] for one in "qkv"]
            yield _renamed(fused[1], VISION_NAMES) + "attn.qkv.weight", torch.cat(parts)
        elif not fused and not name.startswith("language_model"):
            yield _renamed(name, VISION_NAMES), tensor


def _text(tensors: dict[str, torch.Tensor]) -> Any:
    return ((name, tensor) for name, tensor in tensors.items() if name.startswith("language_model"))


def _internlm2(tensors: dict[str, torch.Tensor], kv_heads: int) -> Any:
    for name, tensor in _text(tensors):
        fused = re.fullmatch(r"(.*\.layers\.\d+\.)self_attn\.([qkv])_proj\.weight", name)
        if fused and fused[2] == "q":
            # For each key-value head: its query heads, its key, its value.
            parts = [tensors[f"{fused[1]}self_attn.{one}_proj.weight"] for one in "qkv"]
            of_heads = [part.view(kv_heads, -1, part.shape[-1]) for part in parts]
            yield f"{fused[1]}attention.wqkv.weight", torch.cat(of_heads, 1).flatten(0, 1).contiguous()
        elif not fused:
            yield _renamed(name, INTERNLM2_NAMES), tensor
