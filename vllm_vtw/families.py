# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The model families that can be served. A new family of the same shape is a line in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Family:
    """Checkpoints of one vLLM model class.

    Attributes:
        name: What people call the family.
        model_type: The `model_type` of the checkpoints' configurations.
        architecture: vLLM's model class.
        bridge: The largest number of text tokens between two runs of visual tokens of one image that are
            withdrawn together with them. For example, Pixtral has one `[IMG_BREAK]` after each row of an
            image.
        images: Whether vLLM takes images.
        video: How the visual tokens of a video lie in the prompt. Empty if vLLM takes no videos.
        hub: Names on the Hugging Face Hub of checkpoints that are meant to work.
        in_transformers: Whether transformers has the model. `vtw calibrate` and the other searches need it.
        twin: A checkpoint of the same models in the format of transformers. Empty if there is none.
        mrope: Whether tokens have positions in time, height and width (M-RoPE).
    """

    name: str
    model_type: str
    architecture: str
    bridge: int = 0
    images: bool = True
    video: str = ""
    hub: tuple[str, ...] = ()
    in_transformers: bool = True
    twin: str = ""
    mrope: bool = False


ONE_RUN = "one run"
FRAMES = "a run for each frame; timestamps stay"

PREFIX = "VTW"
"""vLLM's registry lists the plugin's model class for an architecture under its name with this prefix."""

FAMILIES = (
    Family(
        "LLaVA-1.5; Pixtral in transformers' format",
        "llava",
        "LlavaForConditionalGeneration",
        bridge=1,
        hub=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "mistral-community/pixtral-12b"),
    ),
    Family(
        "LLaVA-NeXT",
        "llava_next",
        "LlavaNextForConditionalGeneration",
        hub=("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf"),
    ),
    Family(
        "LLaVA-NeXT-Video",
        "llava_next_video",
        "LlavaNextVideoForConditionalGeneration",
        images=False,
        video=ONE_RUN,
        hub=("llava-hf/LLaVA-NeXT-Video-7B-hf",),
    ),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        video=ONE_RUN,
        hub=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    ),
    Family(
        "LLaVA-OneVision-2",
        "llava_onevision2",
        "LlavaOnevision2ForConditionalGeneration",
        video=FRAMES,
        in_transformers=False,
    ),
    Family(
        "InternVL 2 to 3.5, with code from the Hub",
        "internvl_chat",
        "InternVLChatModel",
        video=f"{FRAMES}; only over Qwen",
        hub=("OpenGVLab/InternVL2-8B", "OpenGVLab/InternVL2_5-8B", "OpenGVLab/InternVL3-8B"),
        in_transformers=False,
        twin="OpenGVLab/InternVL3-8B-hf",
    ),
    Family(
        "InternVL 3 and 3.5 in transformers' format",
        "internvl",
        "InternVLForConditionalGeneration",
        video=FRAMES,
        hub=("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF"),
    ),
    Family(
        "Mistral-Small-3",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        bridge=1,
        hub=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",),
    ),
    Family(
        "Pixtral and Mistral-Small-3 in Mistral's format",
        "pixtral",
        "PixtralForConditionalGeneration",
        bridge=1,
        hub=("mistralai/Pixtral-12B-2409",),
        in_transformers=False,
        twin="mistral-community/pixtral-12b",
    ),
    Family(
        "Qwen2-VL",
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        mrope=True,
        video=ONE_RUN,
        hub=("Qwen/Qwen2-VL-7B-Instruct",),
    ),
    Family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        mrope=True,
        video=ONE_RUN,
        hub=("Qwen/Qwen2.5-VL-7B-Instruct",),
    ),
    Family(
        "Qwen3-VL",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        mrope=True,
        video=FRAMES,
        hub=("Qwen/Qwen3-VL-8B-Instruct",),
    ),
    Family(
        "Qwen3-VL, mixtures of experts",
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        mrope=True,
        video=FRAMES,
        hub=("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    ),
    Family(
        "GLM-4.1V",
        "glm4v",
        "Glm4vForConditionalGeneration",
        mrope=True,
        video=FRAMES,
        hub=("zai-org/GLM-4.1V-9B-Thinking",),
    ),
    Family(
        "GLM-4.5V",
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        mrope=True,
        video=FRAMES,
        hub=("zai-org/GLM-4.5V",),
    ),
    Family(
        "SmolVLM",
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        bridge=5,
        hub=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
    ),
    Family(
        "Idefics3",
        "idefics3",
        "Idefics3ForConditionalGeneration",
        bridge=5,
        hub=("HuggingFaceM4/Idefics3-8B-Llama3", "HuggingFaceTB/SmolVLM-Instruct"),
    ),
    Family(
        "Eagle 2.5",
        "eagle_2_5_vl",
        "Eagle2_5_VLForConditionalGeneration",
        hub=("nvidia/Eagle2.5-8B",),
        in_transformers=False,
    ),
)

BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}

DECODERS = {
    "llama": "llama.LlamaModel",
    "mistral": "mistral.MistralModel",
    "qwen2": "qwen2.Qwen2Model",
    "qwen3": "qwen3.Qwen3Model",
    "qwen3_moe": "qwen3_moe.Qwen3MoeModel",
    "internlm2": "internlm2.InternLM2Model",
    "qwen2_vl_text": "qwen2.Qwen2Model",
    "qwen2_5_vl_text": "qwen2.Qwen2Model",
    "qwen3_vl_text": "qwen3_vl.Qwen3LLMModel",
    "qwen3_vl_moe_text": "qwen3_vl_moe.Qwen3MoeLLMModel",
    "glm4v_text": "glm4.Glm4Model",
    "glm4v_moe_text": "glm4_moe.Glm4MoeModel",
    "transformer": "mistral.MistralModel",  # in Mistral's own format
}
"""By `model_type` of the text model: vLLM's decoder class, within `vllm.model_executor.models`.

These classes only embed tokens, call `layer(positions, hidden_states, residual)` for each layer and apply
`norm(hidden_states, residual)`, which the plugin does in their place. A class that does more, such as
Granite's, which scales embeddings, would be served wrongly and may not stand here.
"""

WHY_NOT = {
    "Gemma3ForConditionalGeneration": "its layers have sliding windows, and images attend in both directions",
    "KimiVLForConditionalGeneration": "its attention is MLA, whose KV cache has another layout",
    "DeepseekVLV2ForCausalLM": "its attention is MLA, whose KV cache has another layout",
    "MiniCPMV": "vLLM's class returns one of several other classes",
    "MiniCPMO": "vLLM's class returns one of several other classes",
    "MiniCPMV4_6ForConditionalGeneration": "its decoder has recurrent layers, which hold no KV blocks",
    "MiniCPMV4_7ForConditionalGeneration": "its decoder has recurrent layers, which hold no KV blocks",
    "Qwen3_5ForConditionalGeneration": "its decoder has recurrent layers, which hold no KV blocks",
    "Qwen3_5MoeForConditionalGeneration": "its decoder has recurrent layers, which hold no KV blocks",
    "MolmoForCausalLM": "its images are short rows of tokens, and vLLM calls its layers differently",
    "GLM4VForCausalLM": "vLLM calls its layers differently",
}
"""By architecture: the reason why a well-known model cannot be served."""


WINDOW_REMEDY = (
    'disable it with --hf-overrides \'{"text_config": {"sliding_window": null}}\' if the model allows'
)
ELSEWHERE = "serve this model without --model-impl vtw"


class Refusal(NamedTuple):
    """Why a model cannot be served.

    Attributes:
        reason: The reason, as a sentence without a full stop.
        remedy: What to do instead, as a clause.
    """

    reason: str
    remedy: str = ELSEWHERE

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def supported_architecture(architectures: Sequence[str]) -> str | None:
    """The first of these names in a checkpoint's configuration that can be served. None if there is none."""
    return next((name for name in architectures if name in BY_ARCHITECTURE), None)


def refusal(architectures: Sequence[str]) -> Refusal | None:
    """Why a model cannot be served. None if it can, as far as its class tells.

    Args:
        architectures: The names in the checkpoint's configuration.
    """
    if supported_architecture(architectures) is not None:
        return None
    if not architectures:
        return Refusal("config.json names no architectures", 'add "architectures", as vLLM needs them')
    name = architectures[0]
    why = WHY_NOT.get(name, f"supported are {', '.join(BY_ARCHITECTURE)}")
    return Refusal(f"--model-impl vtw does not support {name}: {why}")


def text_refusal(model_type: str | None, text: Mapping[str, Any]) -> Refusal | None:
    """Why a model with this text model cannot be served. None if it can.

    Args:
        model_type: The text model's type. `PretrainedConfig.to_dict` loses it where the class has none.
        text: The text model's configuration.
    """
    if model_type not in DECODERS:
        return Refusal(f"the text model is {model_type!r}; supported are {', '.join(DECODERS)}")
    is_qwen = model_type.startswith("qwen")
    # Qwen's configurations have the size of a window that they do not use.
    if text.get("sliding_window") is not None and text.get("use_sliding_window", not is_qwen):
        why = "the text model attends over a sliding window, which would count withdrawn tokens"
        return Refusal(why, ELSEWHERE if is_qwen else WINDOW_REMEDY)
    return None


def how_to_find_a_layer(model_type: str) -> str:
    """How to find a withdrawal layer K for a model without a published one, as a clause.

    Args:
        model_type: The `model_type` of the checkpoint's configuration.
    """
    family = BY_MODEL_TYPE.get(model_type)
    if family is None or family.in_transformers:
        return "`vtw calibrate MODEL --data FILE` finds a layer K for your own data"
    if family.twin:
        return (
            "transformers cannot read this format, so searches cannot either: run `vtw calibrate` on the "
            f'same model in the format of transformers, such as {family.twin}, and serve its K as "layer"'
        )
    return (
        "`vtw calibrate` and other searches cannot run this model, because transformers lacks it: serve your "
        "own questions at several layers K, starting at three quarters of all layers, and compare the answers"
    )


DEEPSTACK = "The model adds visual features to hidden states after its first {} layers (deepstack)"
"""Why withdrawal cannot begin at a layer before `first_layer`, as a sentence without a full stop."""


def first_layer(hf_config: Any) -> int:
    """The first layer that visual tokens may be withdrawn at.

    Qwen3-VL adds visual features to the hidden states after each of its first layers (deepstack), for which
    the visual tokens have to be there.

    Args:
        hf_config: The checkpoint's configuration.
    """
    vision = getattr(hf_config, "vision_config", None)
    return max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))
