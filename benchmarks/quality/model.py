# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The model's shape, tokenizer and processor, and the folder that vLLM and transformers load."""

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
# A chat's fixed parts are one token each; so are words. The characters of a string stay apart: the text that
# the tokenizer learns from has no two of them together.
FIXED = ["USER:", "ASSISTANT:"]
MAX_ANSWER_TOKENS = 40
# A request is a picture and a question, a training row a picture and many: so in two parts.
PICTURE_PART = "USER: <image>\n"


def question_part(question: str) -> str:
    return f"{question} ASSISTANT:"


def tokenizer() -> PreTrainedTokenizerFast:
    rng = Random("tokenizer")
    lines = []
    for _ in range(300):
        scene = Scene.random(rng)
        asked = [ask(task, scene, rng) for task in [*TASKS, *AUXILIARY_TASKS]]
        lines += [f"{q.text} {q.answer if q.answer not in scene.text else ''}" for q in asked if q]
    return make_tokenizer(lines, 400, FIXED)


def config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
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
    """What the image processor makes of pictures of `SIZE`: `(n, SIZE, SIZE, 3)` to `(n, 3, SIZE, SIZE)`."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model, tokenizer and processor to `folder`, with weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer, SIZE, PATCH).save_pretrained(folder)
    rename_vision_tower(folder / "model.safetensors")
