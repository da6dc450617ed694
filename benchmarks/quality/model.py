# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The shape, tokenizer and processor of the trained model, and the folder that vLLM and transformers load."""

from pathlib import Path
from random import Random

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.quality.scenes import SIZE, Scene
from benchmarks.quality.tasks import AUXILIARY_TASKS, TASKS, ask
from benchmarks.small_llava import make_processor, make_tokenizer, rename_vision_tower

CHECKPOINT = Path(__file__).with_name("checkpoint")
PATCH = 12
SIDE = SIZE // PATCH
VISUAL_TOKENS = SIDE**2
LAYERS, HIDDEN, HEADS = 12, 128, 4
# The fixed parts of a chat are one token each, and so are words. The characters of a rendered string are
# separate tokens, because the text that the tokenizer is trained on has no two of them together.
FIXED = ["USER:", "ASSISTANT:"]
MAX_ANSWER_TOKENS = 40
# The prompt has two parts, because a request has an image and one question, and a training row has an image
# and many questions.
PICTURE_PART = "USER: <image>\n"


def question_part(question: str) -> str:
    """The part of the prompt behind the image."""
    return f"{question} ASSISTANT:"


def tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer on questions and answers about random scenes. It is the same every time."""
    rng = Random("tokenizer")
    lines = []
    for _ in range(300):
        scene = Scene.random(rng)
        asked = [ask(task, scene, rng) for task in [*TASKS, *AUXILIARY_TASKS]]
        lines += [f"{q.text} {q.answer if q.answer not in scene.text else ''}" for q in asked if q]
    return make_tokenizer(lines, 400, FIXED)


def config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The configuration of the model."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=HIDDEN,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2048,
            initializer_range=HIDDEN**-0.5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises images as the image processor does.

    Args:
        pixels: Values from 0 to 255, shape `(images, SIZE, SIZE, 3)`.

    Returns:
        The pixels that the vision tower gets, shape `(images, 3, SIZE, SIZE)`.
    """
    mean, std = (torch.tensor(values, device=pixels.device) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model, tokenizer and processor to `folder`, with weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer, SIZE, PATCH).save_pretrained(folder)
    rename_vision_tower(folder / "model.safetensors")
