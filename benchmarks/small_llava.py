# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes small LLaVA checkpoints with random weights, in the format that vLLM and transformers load.

Their answers mean nothing but depend on every token of the prompt. If two engines give the same answers, they
compute the same.
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PATCH_SIZE = 14
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The text that the tokenizer is trained on. It has so many words that most tokens are whole words.
CORPUS = """\
USER: What is in this image? ASSISTANT: Describe the picture in one word, please. Which colour has the
small round shape beside a large square? There are three birds above an old stone bridge, and two
children with red umbrellas walk under it toward their mother. Behind them a river runs between green
hills where sheep sleep in the evening light. Nobody knows how many boats wait near that harbour, or why
every window of yonder yellow house stands open during winter storms. Some people say cats like warm
kitchens better than gardens full of flowers; others just laugh. Tell me about mountains, clouds,
trains, bicycles, apples, bread, music and all those quiet places far away. Grandfather keeps golden
coins, silver spoons, wooden toys, paper kites, broken clocks and purple candles inside his garage.
Doctors, teachers, farmers, drivers, painters, sailors, bakers, dancers and soldiers march across the
busy market. Black horses, brown dogs, white rabbits, green frogs, grey elephants, orange foxes, pink
dolphins and striped tigers jump over fences, rocks, tables, chairs, ladders, bottles, carpets, mirrors,
keyboards, guitars, helmets, bridges, castles, islands."""


@dataclass(frozen=True)
class SmallLlava:
    """The shape of a small LLaVA checkpoint.

    Attributes:
        layers: The number of decoder layers.
        hidden: The decoder's hidden size.
        heads: The number of attention heads.
        kv_heads: The number of key-value heads.
        backbone: The text model, a key of `TEXT_CONFIGS`.
        image_side: The width and height of an image in patches. Each patch becomes a visual token.
        vocab: The size of the vocabulary.
        max_positions: The largest number of tokens of a request.
        seed: The seed of the weights.
        model_type: `"llava"`, or `"llava_next"`, which also cuts an image into up to four tiles of this size.
    """

    layers: int = 8
    hidden: int = 64
    heads: int = 2
    kv_heads: int = 2
    backbone: str = "llama"
    image_side: int = 10
    vocab: int = 512
    max_positions: int = 2048
    seed: int = 0
    model_type: str = "llava"

    def save(self, folder: Path) -> Path:
        """Writes the model, tokenizer and processor to `folder`, and returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer([CORPUS], self.vocab)
        side = self.image_side * PATCH_SIZE
        make_processor(tokenizer, side, PATCH_SIZE, self._tilings()).save_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = AutoModelForImageTextToText.from_config(self._config(tokenizer)).eval()
            randomize(model)
        model.save_pretrained(folder)
        rename_vision_tower(folder / "model.safetensors")
        return folder

    def _tilings(self) -> list[tuple[int, int]] | None:
        """The sizes that LLaVA-NeXT fits images to, as height and width in pixels. None for LLaVA-1.5."""
        side = self.image_side * PATCH_SIZE
        tilings = [(side, 2 * side), (2 * side, side), (2 * side, 2 * side)]
        return tilings if self.model_type == "llava_next" else None

    def _config(self, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig | LlavaNextConfig:
        text: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.backbone == "mistral":
            text["sliding_window"] = None
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=self.image_side * PATCH_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=32,
        )
        common: dict[str, Any] = {
            "vision_config": vision,
            "text_config": TEXT_CONFIGS[self.backbone](**text),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            "image_seq_length": self.image_side**2,
            "tie_word_embeddings": False,
        }
        tilings = self._tilings()
        return LlavaNextConfig(**common, image_grid_pinpoints=tilings) if tilings else LlavaConfig(**common)


def make_tokenizer(
    corpus: Iterable[str], vocab: int, words: Sequence[str] = (), named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE tokenizer.

    Args:
        corpus: The text that it is trained on.
        vocab: The largest number of tokens, without those of `words`.
        words: Strings that are always one token each, wherever they occur.
        named: By attribute of the tokenizer, further special tokens. The image token is always there.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=[*string.printable[:94], "Ġ", "Ċ"],  # ByteLevel's space and line feed
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens(list(words))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", **(named or {})},
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    patch_size: int,
    tilings: list[tuple[int, int]] | None = None,
) -> LlavaProcessor | LlavaNextProcessor:
    """Makes the processor of a checkpoint, with a chat template.

    Args:
        tokenizer: The checkpoint's tokenizer.
        image_size: The width and height of an image in pixels.
        patch_size: The width and height of a patch in pixels.
        tilings: The sizes that LLaVA-NeXT may fit an image to, as height and width in pixels. None for
            LLaVA-1.5, with CLIP's image processor.
    """
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    kind: Any = LlavaNextProcessor if tilings else LlavaProcessor
    return kind(
        image_processor=LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=tilings)
        if tilings
        else CLIPImageProcessorPil(**sizes),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def randomize(model: nn.Module) -> None:
    """Draws weights that are so large that attention is not uniform and answers do not repeat one token."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1.2 * module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1.0)


def rename_vision_tower(weights: Path) -> None:
    """Renames weights of the vision tower in a checkpoint's file as vLLM expects them.

    transformers 5 writes `vision_tower.*`, and vLLM 0.32 reads `vision_tower.vision_model.*`.
    """
    plain, nested = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(weights)
    renamed = {
        name.replace(plain, nested) if plain in name and nested not in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})
