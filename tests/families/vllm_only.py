# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Small checkpoints of models that vLLM has and transformers lacks, or whose videos it reads otherwise.

Their text models are saved once more in transformers' format, in the folder `text` within the checkpoint.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2VLImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.small_llava import randomize
from tests.families.checkpoints import HIDDEN, LAYERS, internvl_chat, text_config, tokenizer_with, vision

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

# Checkpoints bring files like these. vLLM reads the configuration and makes the processor through them.
CONFIGURATION = """
from transformers import CONFIG_MAPPING, PretrainedConfig


class Config(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, vision_config=None, text_config=None, **options):
        super().__init__(**options)
        vision, text = dict(vision_config or {{}}), dict(text_config or {{"model_type": "qwen2"}})
        kind = CONFIG_MAPPING[vision.pop("model_type")] if "model_type" in vision else PretrainedConfig
        self.vision_config = kind(**vision)
        self.text_config = CONFIG_MAPPING[text.pop("model_type")](**text)
"""
ONEVISION_2_PROCESSOR = """
import torch
from transformers import BatchFeature


class LlavaOnevision2Processor:
    def __init__(self, image_processor, tokenizer, video_processor, codec_config):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text, images=None, **options):
        found = {}
        if images:
            found = dict(self.image_processor(images=images, return_tensors="pt"))
            merge = self.image_processor.merge_size
            parts, positions = text.split("<|image_pad|>"), []
            text = parts[0]
            for part, (_, rows, columns) in zip(parts[1:], found["image_grid_thw"].tolist(), strict=True):
                text += "<|image_pad|>" * (rows * columns // merge**2) + part
                at = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
                blocks = at.view(rows // merge, merge, columns // merge, merge, 3)
                positions.append(blocks.transpose(1, 2).reshape(-1, 3))
            found["patch_positions"] = torch.cat(positions)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return BatchFeature({"input_ids": ids, **found})
"""
ONEVISION_2_VIDEO_PROCESSOR = """
class LlavaOnevision2VideoProcessor:
    def __init__(self, **options):
        pass
"""


def text_model(folder: Path, config: Any) -> Tensors:
    """Saves a text model with random weights, and returns its tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        randomize(model)
    model.save_pretrained(folder / "text")
    return dict(model.state_dict())


def random_tensors(shapes: Shapes) -> Tensors:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()
    }


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def linear(name: str, size: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def write(folder: Path, content: Mapping[str, Any], tensors: Tensors) -> Path:
    """Writes a checkpoint that brings its own configuration class."""
    model_type = content["model_type"]
    (folder / "configuration.py").write_text(CONFIGURATION.format(model_type=model_type))
    settings = {"auto_map": {"AutoConfig": "configuration.Config"}, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**content, **settings, "tie_word_embeddings": False}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def eagle(folder: Path, backbone: str = "qwen2") -> Path:
    """Eagle 2.5: SigLIP, an MLP that takes four neighbouring patches at once, and Qwen2."""
    tokenizer = tokenizer_with("<img>", "</img>", "<IMG_CONTEXT>")
    config, tower = text_config(backbone, tokenizer), vision(SiglipVisionConfig, 112, 14)
    text = text_model(folder, config)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        seen = SiglipVisionModel(tower)
        randomize(seen)
    names = (f"vision_model.vision_model.{name.removeprefix('vision_model.')}" for name in seen.state_dict())
    tensors = dict(zip(names, seen.state_dict().values(), strict=True))
    wide = 4 * tower.hidden_size
    tensors |= random_tensors(
        norm("mlp1.0", wide) | linear("mlp1.1", wide, HIDDEN) | linear("mlp1.3", HIDDEN, HIDDEN)
    )
    content = {
        "architectures": ["Eagle2_5_VLForConditionalGeneration"],
        "model_type": "eagle_2_5_vl",
        "text_config": config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": tower.to_dict(),
        "force_image_size": 112,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "select_layer": -1,
    }
    return write(folder, content, tensors | {f"language_model.{name}": text[name] for name in text})


def llava_onevision2(folder: Path, backbone: str = "qwen3") -> Path:
    """LLaVA-OneVision-2: a tower of its own, which merges two by two patches, and Qwen3."""
    tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config, size, inner, patch = text_config(backbone, tokenizer), 64, 96, 14
    text = text_model(folder, config)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": 784, "longest_edge": 50176},
    ).save_pretrained(folder)
    (folder / "processing_llava_onevision2.py").write_text(ONEVISION_2_PROCESSOR)
    (folder / "video_processing_llava_onevision2.py").write_text(ONEVISION_2_VIDEO_PROCESSOR)
    shapes: Shapes = {"model.visual.embeddings.patch_embedding.weight": (size, 3, patch, patch)}
    shapes |= norm("model.visual.layernorm_pre", size) | norm("model.visual.merger.ln_q", size)
    shapes |= linear("model.visual.merger.mlp.0", 4 * size, 4 * size)
    shapes |= linear("model.visual.merger.mlp.2", 4 * size, HIDDEN)
    for layer in range(2):
        at = f"model.visual.encoder.layers.{layer}"
        shapes |= norm(f"{at}.layer_norm1", size) | norm(f"{at}.layer_norm2", size)
        shapes |= linear(f"{at}.self_attn.qkv", size, 3 * size) | linear(f"{at}.self_attn.proj", size, size)
        shapes |= linear(f"{at}.mlp.fc1", size, inner) | linear(f"{at}.mlp.fc2", inner, size)
    content = {
        "architectures": ["LlavaOnevision2ForConditionalGeneration"],
        "model_type": "llava_onevision2",
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "text_config": config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]},
        "vision_config": {
            "hidden_size": size,
            "intermediate_size": inner,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": patch,
            "spatial_merge_size": 2,
        },
    }
    renamed = {name.replace("model.", "model.language_model."): tensor for name, tensor in text.items()}
    return write(folder, content, random_tensors(shapes) | renamed)


NAMES_OF_MISTRAL = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "output",
}
BYTES, SPECIAL = 256, 64


def pixtral(folder: Path, backbone: str = "mistral") -> Path:
    """Pixtral in the format of Mistral's releases: `params.json`, `tekken.json` and one file of tensors."""
    size, patch, side, inner = 32, 14, 448, 64
    config = text_config(backbone, tokenizer_with())
    config.vocab_size = BYTES + SPECIAL
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 11
    text = text_model(folder, config)
    params = {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        "max_seq_len": 4096,
        "vision_encoder": {
            "hidden_size": size,
            "num_channels": 3,
            "image_size": side,
            "patch_size": patch,
            "intermediate_size": inner,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "rope_theta": 10000.0,
            "image_token_id": 10,
            "max_image_size": side,
        },
    }
    (folder / "params.json").write_text(json.dumps(params))
    single_bytes = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(BYTES)
    ]
    tekken = {
        "config": {
            "pattern": "[^ ]+| +",
            "num_vocab_tokens": BYTES,
            "default_vocab_size": BYTES + SPECIAL,
            "default_num_special_tokens": SPECIAL,
            "version": "v3",
        },
        "vocab": single_bytes,
        "multimodal": {"image_patch_size": patch, "max_image_size": side},
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    shapes = {
        "vision_encoder.patch_conv.weight": (size, 3, patch, patch),
        "vision_encoder.ln_pre.weight": (size,),
    }
    for layer in range(2):
        at = f"vision_encoder.transformer.layers.{layer}"
        shapes |= {f"{at}.attention.{one}.weight": (size, size) for one in ("wq", "wk", "wv", "wo")}
        shapes |= {f"{at}.feed_forward.{one}.weight": (inner, size) for one in ("w1", "w3")}
        shapes |= {f"{at}.feed_forward.w2.weight": (size, inner)}
        shapes |= {f"{at}.{one}.weight": (size,) for one in ("attention_norm", "ffn_norm")}
    shapes |= linear("vision_language_adapter.w_in", size, HIDDEN)
    shapes |= linear("vision_language_adapter.w_out", HIDDEN, HIDDEN)
    tensors = random_tensors(shapes) | dict(_of_mistral(text, config.head_dim))
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


def _of_mistral(text: Tensors, head_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Mistral's own code rotates neighbouring dimensions, and transformers the halves of a head."""
    for full_name, tensor in text.items():
        name = full_name
        for old, new in NAMES_OF_MISTRAL.items():
            name = name.replace(old, new)
        if "wq" in name or "wk" in name:
            halves = tensor.view(-1, 2, head_size // 2, tensor.shape[-1])
            yield name, halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        else:
            yield name, tensor


def internvl_chat_video(folder: Path, backbone: str = "qwen2") -> Path:
    """InternVL in the Hub's format over a text model with which vLLM takes videos."""
    internvl_chat(folder, backbone)
    twin = AutoModelForImageTextToText.from_pretrained(folder / "twin")
    text = AutoModelForCausalLM.from_config(twin.config.text_config)
    text.model.load_state_dict(twin.get_decoder().state_dict())
    text.lm_head.load_state_dict(twin.lm_head.state_dict())
    text.save_pretrained(folder / "text")
    return folder


VISUAL_TOKENS = {
    "eagle": ("<IMG_CONTEXT>",),
    "llava_onevision2": ("<|image_pad|>",),
    "pixtral": ("[IMG]",),
    "internvl_chat_video": ("<IMG_CONTEXT>", "<|video_pad|>"),
}
CHECKPOINTS = {
    "eagle": eagle,
    "llava_onevision2": llava_onevision2,
    "pixtral": pixtral,
    "internvl_chat_video": internvl_chat_video,
}
