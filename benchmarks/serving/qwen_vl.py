# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Configurations and processors of Qwen-VL models of any size, with images of any resolution."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from benchmarks.small_llava import CHAT_TEMPLATE, CORPUS, make_tokenizer
from vllm_vtw.families import BY_MODEL_TYPE

PIXELS = {"qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_vl_moe": 32}
"""By model type: the width and height in pixels of four patches, which become one visual token."""
SIDES = (2, 32)
"""The smallest and the largest width and height of an image, in visual tokens."""
FRAMES = 1000
"""The largest number of frames of a video."""
AROUND = ("<|vision_start|>", "<|vision_end|>")
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
PLACEHOLDER = IMAGE.join(AROUND)
SPECIAL_TOKENS = len((*AROUND, IMAGE, VIDEO))
CONFIGS = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig, "qwen3_vl_moe": Qwen3VLMoeConfig}


def tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer in which each of `words` is one token, with a chat template."""
    made = make_tokenizer([CORPUS], 512, words, {"image_token": IMAGE, "video_token": VIDEO})
    made.add_tokens(list(AROUND), special_tokens=True)
    made.chat_template = CHAT_TEMPLATE.replace("<image>", PLACEHOLDER)
    return made


def processor(model_type: str, of: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor | Qwen3VLProcessor:
    """Makes a model's processor, which resizes images that are smaller or larger than `SIDES`."""
    pixels = PIXELS[model_type]
    shortest, longest = ((side * pixels) ** 2 for side in SIDES)
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": shortest, "longest_edge": longest},
        "patch_size": pixels // 2,
    }
    # Of videos, the sizes are those of all frames together.
    of_videos = sizes | {"size": {"shortest_edge": shortest, "longest_edge": FRAMES * longest}}
    if model_type == "qwen2_5_vl":
        kind, video = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor(**of_videos)
    else:
        kind, video = Qwen3VLProcessor, Qwen3VLVideoProcessor(**of_videos)
    return kind(Qwen2VLImageProcessorPil(**sizes), of, video, chat_template=of.chat_template)


def config(
    model_type: str,
    of: PreTrainedTokenizerFast,
    text: dict[str, Any],
    head_dim: int,
    vision: dict[str, Any],
) -> PretrainedConfig:
    """Makes a model's configuration.

    Args:
        model_type: A key of `PIXELS`.
        of: The tokenizer.
        text: Options of the text model.
        head_dim: The size of the text model's heads.
        vision: `depth`, `hidden_size` and `out_hidden_size` of the vision tower. Its other sizes are as large
            in proportion as published.
    """
    depth, hidden = vision["depth"], vision["hidden_size"]
    height = width = 3 * head_dim // 16
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [head_dim // 2 - height - width, height, width],
    }
    if model_type == "qwen2_5_vl":
        sizes = {"intermediate_size": hidden * 3420 // 1280, "num_heads": hidden // 80, "window_size": 112}
        sizes["fullatt_block_indexes"] = list(range(7, depth, 8))
    else:
        text = text | {"head_dim": head_dim}
        rope["mrope_interleaved"] = True
        sizes = {"intermediate_size": hidden * 4304 // 1152, "num_heads": hidden // 72, "patch_size": 16}
        sizes["deepstack_visual_indexes"] = [depth * part // 27 for part in (8, 16, 24)]
    kind = CONFIGS[model_type]
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    names |= dict(zip(("vision_start_token_id", "vision_end_token_id"), AROUND, strict=True))
    made: PretrainedConfig = kind(
        architectures=[BY_MODEL_TYPE[model_type].architecture],
        vision_config=vision | sizes,
        text_config=text | {"rope_parameters": rope, "tie_word_embeddings": False},
        tie_word_embeddings=False,
        **{name: of.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return made
