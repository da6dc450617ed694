# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The models that benchmarks serve. They have no weights: `--load-format dummy` lets vLLM make them up.

Speed and memory depend only on a model's shape, so the results are those of real weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PretrainedConfig, PreTrainedTokenizerFast

from benchmarks.serving import qwen_vl
from benchmarks.small_llava import CORPUS, PATCH_SIZE, make_processor, make_tokenizer
from vllm_vtw.search.price import Price, RequestTokens

PIXELS = {"llava": PATCH_SIZE, **qwen_vl.PIXELS}
"""By model type: the width and height in pixels of what becomes a visual token."""


@dataclass(frozen=True)
class Model:
    """The shape of a model.

    Attributes:
        name: The name that tables show.
        layers: The number of decoder layers.
        hidden: The decoder's hidden size.
        intermediate: The decoder's intermediate size, or that of an expert.
        heads: The number of attention heads.
        vocab: The size of the vocabulary.
        image_side: The width and height of an image in visual tokens.
        vision_layers: The number of layers of the vision tower.
        vision_hidden: The vision tower's hidden size.
        model_type: LLaVA-1.5's architecture (`llava`), or one of `qwen_vl.PIXELS`.
        kv_heads: The number of key-value heads. None for as many as `heads`.
        head_dim: The size of a head. None for the hidden size divided by `heads`.
        experts: The number of experts of a layer.
        active_experts: The number of experts that compute a token.
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
    model_type: str = "llava"
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int = 1
    active_experts: int = 1

    @property
    def max_positions(self) -> int:
        """The largest number of tokens of a request."""
        return 4096 if self.model_type == "llava" else 8192

    @property
    def attention_width(self) -> int:
        """The number of attention heads times their size."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """The number of key-value heads times their size."""
        return self.attention_width // self.heads * (self.kv_heads or self.heads)

    @property
    def placeholder(self) -> str:
        """What stands for an image in a prompt."""
        return "<image>\n" if self.model_type == "llava" else qwen_vl.PLACEHOLDER

    @property
    def served_as(self) -> dict[str, Any]:
        """What a policy file says about the model."""
        return {"model_type": self.model_type, "num_hidden_layers": self.layers, "hidden_size": self.hidden}

    def visual_tokens(self, image_side: int | None = None) -> int:
        """The number of visual tokens of an image.

        Args:
            image_side: The width and height of the image in visual tokens. None for the model's.
        """
        return (image_side or self.image_side) ** 2

    def pixels(self, image_side: int | None = None) -> int:
        """The width and height of an image in pixels. The argument is that of `visual_tokens`."""
        return (image_side or self.image_side) * PIXELS[self.model_type]

    def layer_parameters(self, experts: int) -> int:
        """The number of parameters of a decoder layer with so many experts."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate * experts

    def price(self, request: RequestTokens) -> Price:
        """Computes the cost of policies for requests of one kind."""
        return Price(self.layers, self.layer_parameters(self.active_experts), self.attention_width, request)

    def save(self, folder: Path) -> Path:
        """Writes the configuration, tokenizer and processor to `folder`, and returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        # A model with random weights says any id. The server streams nothing for an id without text, so most
        # ids get a word.
        words = [f" w{number}" for number in range(self.vocab - 512)]
        if self.model_type == "llava":
            tokenizer = make_tokenizer([CORPUS], 512, words)
            make_processor(tokenizer, self.pixels(), PATCH_SIZE).save_pretrained(folder)
            self._llava_config(tokenizer).save_pretrained(folder)
        else:
            tokenizer = qwen_vl.tokenizer(words[: -qwen_vl.SPECIAL_TOKENS])
            qwen_vl.processor(self.model_type, tokenizer).save_pretrained(folder)
            self._qwen_vl_config(tokenizer).save_pretrained(folder)
        return folder

    def _text_options(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def _llava_config(self, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
        return LlavaConfig(
            architectures=["LlavaForConditionalGeneration"],
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=4 * self.vision_hidden,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_hidden // 64,
                image_size=self.pixels(),
                patch_size=PATCH_SIZE,
            ),
            text_config=LlamaConfig(**self._text_options(tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=self.visual_tokens(),
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )

    def _qwen_vl_config(self, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
        text = self._text_options(tokenizer)
        if self.experts > 1:
            text |= {
                "moe_intermediate_size": self.intermediate,
                "num_experts": self.experts,
                "num_experts_per_tok": self.active_experts,
                "norm_topk_prob": True,
            }
        head_dim = self.attention_width // self.heads
        vision = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "out_hidden_size": self.hidden,
        }
        return qwen_vl.config(self.model_type, tokenizer, text, head_dim, vision)


LLAVA_7B = Model("LLaVA-1.5-7B's shape", 32, 4096, 11008, 32, 32064, 24, 24, 1024)
QWEN2_5_VL_7B = Model(
    "Qwen2.5-VL-7B's shape", 28, 3584, 18944, 28, 152064, 32, 32, 1280, "qwen2_5_vl", kv_heads=4
)
QWEN3_VL_8B = Model(
    "Qwen3-VL-8B's shape", 36, 4096, 12288, 32, 151936, 32, 27, 1152, "qwen3_vl", kv_heads=8, head_dim=128
)
QWEN3_VL_30B_A3B = Model(
    *("Qwen3-VL-30B-A3B's shape", 48, 2048, 768, 32, 151936, 32, 27, 1152, "qwen3_vl_moe"),
    kv_heads=4,
    head_dim=128,
    experts=128,
    active_experts=8,
)
QUARTER = Model("16 layers of width 1024", 16, 1024, 2048, 16, 1024, 12, 8, 256)
"""A small model. An image has a quarter of LLaVA-1.5's visual tokens, and the vision tower is as large as in
LLaVA-1.5, relative to the decoder."""
SMALL_QWEN = Model(
    *("16 layers of width 1024, Qwen2.5-VL's architecture", 16, 1024, 2048, 16, 1024, 16, 8, 320),
    model_type="qwen2_5_vl",
    kv_heads=4,
)
