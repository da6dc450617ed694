# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Small checkpoints of families whose tokens have positions in time, height and width (M-RoPE)."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Glm4vConfig,
    Glm4vImageProcessorPil,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.families.checkpoints import HIDDEN, save, text_options, tokenizer_with

SIZE = {"size": {"shortest_edge": 784, "longest_edge": 50176}}
VIDEO_SIZE = {"size": {"shortest_edge": 784, "longest_edge": 401408}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""vLLM normalizes Qwen3-VL's videos with the numbers of the image processor."""


def text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return text_options(tokenizer) | {"rope_parameters": rope, **more}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(
        "<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )


def ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def qwen2_vl(folder: Path) -> Path:
    tokenizer = qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
        text_config=text(tokenizer),
        **ids_of(tokenizer),
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**SIZE), tokenizer, Qwen2VLVideoProcessor(**VIDEO_SIZE)
    )
    return save(config, processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text(tokenizer), **ids_of(tokenizer))
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**SIZE), tokenizer, Qwen2VLVideoProcessor(**VIDEO_SIZE)
    )
    return save(config, processor, folder)


def qwen3_vl(folder: Path, kind: Any = Qwen3VLConfig, **more: Any) -> Path:
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "patch_size": 14,
        "deepstack_visual_indexes": [0, 1],
    }
    options = text(tokenizer, head_dim=HIDDEN // 2, **more)
    options["rope_parameters"]["mrope_interleaved"] = True
    config = kind(vision_config=vision, text_config=options, **ids_of(tokenizer))
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**SIZE, **HALF, patch_size=14),
        tokenizer,
        Qwen3VLVideoProcessor(**VIDEO_SIZE, **HALF, patch_size=14),
    )
    return save(config, processor, folder)


def qwen3_vl_moe(folder: Path) -> Path:
    """For vLLM, as on the Hub, matrices of experts have inputs first. `save_pretrained` writes them last."""
    experts = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
    qwen3_vl(folder, Qwen3VLMoeConfig, **experts, norm_topk_prob=True)
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.transpose(-1, -2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def glm4v(folder: Path, kind: Any = Glm4vConfig, **more: Any) -> Path:
    tokenizer = tokenizer_with(
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
        image_token="<|image|>",
        video_token="<|video|>",
    )
    names = {
        "image_token_id": "<|image|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_token_id": "<|video|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "image_size": 112,
    }
    options = text(tokenizer, attention_bias=True, **more)
    options["rope_parameters"] |= {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    config = kind(
        vision_config=vision,
        text_config=options,
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    processor = Glm4vProcessor(
        Glm4vImageProcessorPil(**VIDEO_SIZE), tokenizer, Glm4vVideoProcessor(**VIDEO_SIZE)
    )
    return save(config, processor, folder)


def glm4v_moe(folder: Path) -> Path:
    experts = {"moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return glm4v(folder, Glm4vMoeConfig, **experts, head_dim=HIDDEN // 2, use_qk_norm=False)


CHECKPOINTS = {
    made.__name__: made for made in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, glm4v, glm4v_moe)
}
