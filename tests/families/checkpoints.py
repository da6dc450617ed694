# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Small checkpoints with random weights, of each family's own configuration and processor classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Mistral3Config,
    MistralConfig,
    PixtralImageProcessorPil,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from benchmarks.small_llava import CORPUS, make_tokenizer, randomize, rename_vision_tower
from tests.families import internvl_chat as chat_format

TEXT_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
LAYERS, HIDDEN, VOCAB = 6, 64, 640


def tokenizer_with(*words: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer in which each of these strings is a special token. `named` become attributes, too."""
    tokenizer = make_tokenizer([CORPUS], 512, named=named)
    tokenizer.add_tokens(list(words), special_tokens=True)
    return tokenizer


def text_options(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the text models of all families have in common."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def text_config(backbone: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Any:
    options = text_options(tokenizer) | {"head_dim": HIDDEN // 2}
    if backbone == "mistral":
        options["sliding_window"] = None
    if backbone == "qwen3_moe":
        options |= {
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        }
    return TEXT_CONFIGS[backbone](**(options | more))


def vision(kind: Any, side: Any, patch: Any, **more: Any) -> Any:
    """The configuration of a vision tower for images of `side` pixels."""
    return kind(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        **more,
    )


def save(config: Any, processor: Any, folder: Path) -> Path:
    """Writes a model of this configuration, with random weights, and its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config).eval()
        randomize(model)
    model.save_pretrained(folder)
    return folder


def llava_next(folder: Path, backbone: str = "mistral") -> Path:
    tokenizer = tokenizer_with()
    side, patch = 56, 14
    tilings = [(side, 2 * side), (2 * side, side), (2 * side, 2 * side)]
    config = LlavaNextConfig(
        vision_config=vision(CLIPVisionConfig, side, patch, projection_dim=32),
        text_config=text_config(backbone, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tilings,
        tie_word_embeddings=False,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=tilings,
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    save(config, processor, folder)
    rename_vision_tower(folder / "model.safetensors")
    return folder


def llava_next_video(folder: Path, backbone: str = "llama") -> Path:
    tokenizer = tokenizer_with("<video>")
    side, patch = 32, 4  # vLLM divides the side by the square of the patch's
    config = LlavaNextVideoConfig(
        vision_config=vision(CLIPVisionConfig, side, patch, projection_dim=32),
        text_config=text_config(backbone, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[(2 * side, 2 * side)],
        tie_word_embeddings=False,
    )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**size),
        image_processor=LlavaNextImageProcessorPil(**size, image_grid_pinpoints=[(2 * side, 2 * side)]),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    save(config, processor, folder)
    rename_vision_tower(folder / "model.safetensors")
    return folder


def llava_onevision(folder: Path, backbone: str = "qwen2") -> Path:
    tokenizer = tokenizer_with("<video>")
    side, patch = 56, 14
    tilings = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    config = LlavaOnevisionConfig(
        vision_config=vision(SiglipVisionConfig, side, patch, vision_use_head=False),
        text_config=text_config(backbone, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tilings,
        tie_word_embeddings=False,
    )
    size = {"size": {"height": side, "width": side}}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(**size, image_grid_pinpoints=tilings),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
    )
    save(config, processor, folder)
    rename_vision_tower(folder / "model.safetensors")
    return folder


def internvl(folder: Path, backbone: str = "qwen3") -> Path:
    # In the Hub's format, visual tokens of a video are <|video_pad|>.
    tokenizer = tokenizer_with(
        "<|video_pad|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    side, patch = 112, 14
    config = InternVLConfig(
        vision_config=vision(InternVLVisionConfig, [side, side], [patch, patch]),
        text_config=text_config(backbone, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"size": {"height": side, "width": side}}
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            **size, **means, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**size),
        image_seq_length=16,
    )
    return save(config, processor, folder)


def internvl_chat(folder: Path, backbone: str = "internlm2") -> Path:
    """Its twin in transformers' format is in the folder `twin` within it."""
    twin = internvl(folder / "twin", {"internlm2": "llama"}.get(backbone, backbone))
    return chat_format.rewrite(twin, folder, backbone)


def pixtral_processor() -> PixtralProcessor:
    return PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 448}, patch_size={"height": 14, "width": 14}
        ),
        tokenizer=tokenizer_with("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=14,
    )


def mistral3(folder: Path, backbone: str = "mistral") -> Path:
    processor = pixtral_processor()
    processor.spatial_merge_size = 2
    config = Mistral3Config(
        vision_config=vision(PixtralVisionConfig, 448, 14, head_dim=16),
        text_config=text_config(backbone, processor.tokenizer),
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
        multimodal_projector_bias=False,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return save(config, processor, folder)


def llava_over_pixtral(folder: Path, backbone: str = "mistral") -> Path:
    processor = pixtral_processor()
    config = LlavaConfig(
        vision_config=vision(PixtralVisionConfig, 448, 14, head_dim=16),
        text_config=text_config(backbone, processor.tokenizer),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return save(config, processor, folder)


def idefics_tokenizer() -> PreTrainedTokenizerFast:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return tokenizer_with(
        *tiles, "<global-img>", "<fake_token_around_image>", "<end_of_utterance>", "<video>"
    )


def idefics3(folder: Path, backbone: str = "llama", kind: str = "idefics3") -> Path:
    tokenizer = idefics_tokenizer()
    side, patch = 112, 14
    is_smol = kind == "smolvlm"
    config = (SmolVLMConfig if is_smol else Idefics3Config)(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
        },
        text_config=text_config(backbone, tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    size: dict[str, Any] = {
        "size": {"longest_edge": 2 * side},
        "max_image_size": {"longest_edge": side},
    }
    sequence = (side // patch) ** 2 // 4
    if is_smol:
        processor: Any = SmolVLMProcessor(
            SmolVLMImageProcessorPil(**size),
            tokenizer,
            SmolVLMVideoProcessor(**size),
            image_seq_len=sequence,
        )
    else:
        processor = Idefics3Processor(Idefics3ImageProcessorPil(**size), tokenizer, image_seq_len=sequence)
    return save(config, processor, folder)


def smolvlm(folder: Path, backbone: str = "llama") -> Path:
    return idefics3(folder, backbone, kind="smolvlm")


CHECKPOINTS: dict[str, Callable[..., Path]] = {
    made.__name__: made
    for made in (
        llava_next,
        llava_next_video,
        llava_onevision,
        internvl,
        internvl_chat,
        mistral3,
        llava_over_pixtral,
        idefics3,
        smolvlm,
    )
}
