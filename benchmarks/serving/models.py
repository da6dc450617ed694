# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The LLaVA models that benchmarks serve. They have no weights: `--load-format dummy` lets vLLM make them up.

Speed and memory depend only on a model's shape, so the results are those of real weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.small_llava import CORPUS, PATCH_SIZE, make_processor, make_tokenizer
from vllm_vtw.search.price import Price, RequestTokens

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Llava:
    """The shape of a model with LLaVA-1.5's architecture.

    Attributes:
        name: The name that tables show.
        layers: The number of decoder layers.
        hidden: The decoder's hidden size.
        intermediate: The decoder's intermediate size.
        heads: The number of attention heads, and of key-value heads.
        vocab: The size of the vocabulary.
        image_side: The width and height of an image in patches. Each patch becomes a visual token.
        vision_layers: The number of layers of the vision tower.
        vision_hidden: The vision tower's hidden size.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    image_side: int
    vision_layers: int
    vision_hidden: int

    @property
    def visual_tokens(self) -> int:
        """The number of visual tokens of an image."""
        return self.image_side**2

    @property
    def pixels(self) -> int:
        """The width and height of an image in pixels."""
        return self.image_side * PATCH_SIZE

    @property
    def layer_parameters(self) -> int:
        """The number of parameters of a decoder layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def served_as(self) -> dict[str, Any]:
        """What a policy file says about the model."""
        return {"model_type": "llava", "num_hidden_layers": self.layers, "hidden_size": self.hidden}

    def price(self, request: RequestTokens) -> Price:
        """Computes the cost of policies for requests of one kind."""
        return Price(self.layers, self.layer_parameters, self.hidden, request)

    def save(self, folder: Path) -> Path:
        """Writes the configuration, tokenizer and processor to `folder`, and returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        # A model with random weights says any id. The server streams nothing for an id without text, so most
        # ids get a word.
        tokenizer = make_tokenizer([CORPUS], 512, [f" w{number}" for number in range(self.vocab - 512)])
        make_processor(tokenizer, self.pixels, PATCH_SIZE).save_pretrained(folder)
        LlavaConfig(
            architectures=["LlavaForConditionalGeneration"],
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=4 * self.vision_hidden,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_hidden // 64,
                image_size=self.pixels,
                patch_size=PATCH_SIZE,
            ),
            text_config=LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=MAX_POSITIONS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=self.visual_tokens,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        ).save_pretrained(folder)
        return folder


LLAVA_7B = Llava("LLaVA-1.5-7B's shape", 32, 4096, 11008, 32, 32064, 24, 24, 1024)
QUARTER = Llava("16 layers of width 1024", 16, 1024, 2048, 16, 1024, 12, 8, 256)
"""A small model. An image has a quarter of LLaVA-1.5's visual tokens, and the vision tower is as large as in
LLaVA-1.5, relative to the decoder."""
