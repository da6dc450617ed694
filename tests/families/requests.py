# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""How requests of each family look, and what answers to them have to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams

from benchmarks.small_llava import SmallLlava
from tests.families.checkpoints import HIDDEN, LAYERS
from tests.families.oracle import FamilyOracle

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
slow = pytest.mark.slow


def ids_of_pixtral(prompt: str, images: Sequence[Any]) -> list[int]:
    """A prompt in Mistral's own format, where every byte of text is a token.

    Tokens 10, 12 and 13 are `[IMG]`, `[IMG_BREAK]` and `[IMG_END]`. An image has one `[IMG]` for each patch.
    """
    first, *others = prompt.split("[IMG]")
    ids = [1, *(64 + byte for byte in first.encode())]
    for image, text in zip(images, others, strict=True):
        columns, rows = image.width // 14, image.height // 14
        ids += ([10] * columns + [12]) * rows
        ids[-1] = 13
        ids += [64 + byte for byte in text.encode()]
    return ids


@dataclass(frozen=True)
class Family:
    """How prompts of a family say where images and videos are, and what leaves with them.

    Attributes:
        image: The placeholder of an image. Empty if prompts have none.
        video: The placeholder of a video.
        bridge: The gaps within an image that leave with it.
        twin_image: The placeholder of an image in the checkpoint's twin.
        tokenize: Makes token ids of a prompt, if vLLM takes no text.
        options: Options of the engine.
        first: The first layer that tokens may leave at.
        takes_both: Whether transformers computes a prompt with an image and a video.
    """

    image: str = ""
    video: str = ""
    bridge: int = 0
    twin_image: str = ""
    tokenize: Callable[[str, Sequence[Any]], list[int]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    first: int = 1
    takes_both: bool = True

    def for_oracle(self, prompt: str) -> str:
        """The prompt with the placeholders of the twin, if transformers lacks the model."""
        return prompt.replace(self.image, self.twin_image) if self.twin_image else prompt


REMOTE = {"trust_remote_code": True}
OF_MISTRAL = dict.fromkeys(("tokenizer_mode", "config_format", "load_format"), "mistral")
AROUND = "<|vision_start|><|{}_pad|><|vision_end|>"
AROUND_GLM = "<|begin_of_{0}|><|{0}|><|end_of_{0}|>"
FAMILIES = {
    "llava_next": Family("<image>"),
    "llava_next_video": Family(video="<video>"),
    "llava_onevision": Family("<image>", "<video>"),
    "internvl": Family("<IMG_CONTEXT>", "<video>"),
    "internvl_chat": Family("<image>", twin_image="<IMG_CONTEXT>", options=REMOTE),
    "mistral3": Family("[IMG]", bridge=1),
    "llava_over_pixtral": Family("[IMG]", bridge=1),
    "idefics3": Family("<image>", bridge=5),
    "smolvlm": Family("<image>", bridge=5),
    "qwen2_vl": Family(AROUND.format("image"), AROUND.format("video")),
    "qwen2_5_vl": Family(AROUND.format("image"), AROUND.format("video")),
    "qwen3_vl": Family(AROUND.format("image"), AROUND.format("video"), first=2),
    "qwen3_vl_moe": Family(AROUND.format("image"), AROUND.format("video"), first=2),
    "glm4v": Family(AROUND_GLM.format("image"), AROUND_GLM.format("video"), takes_both=False),
    "glm4v_moe": Family(AROUND_GLM.format("image"), AROUND_GLM.format("video"), takes_both=False),
    "eagle": Family("<image>", options=REMOTE),
    "internvl_chat_video": Family("<image>", "<video>", options=REMOTE),
    "llava_onevision2": Family(AROUND.format("image"), AROUND.format("video"), options=REMOTE),
    "pixtral": Family("[IMG]", bridge=1, tokenize=ids_of_pixtral, options=OF_MISTRAL),
}
"""`bridge` says it again on purpose: the number in the code is tested against it."""


def noise(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


WIDE, SQUARE = Image.fromarray(noise(1, 112, 224, 3)), Image.fromarray(noise(2, 224, 224, 3))
FRAMES = noise(3, 4, 56, 56, 3)
METADATA = {
    "fps": 2.0,
    "duration": 2.0,
    "total_num_frames": 4,
    "frames_indices": [0, 1, 2, 3],
    "video_backend": "opencv",
    "do_sample_frames": False,
}
MIDDLE, FIRST, TWO, TEXT, VIDEO, BOTH = "middle", "first", "two", "text", "video", "both"


@dataclass(frozen=True)
class Ask:
    """A prompt, with its images and videos."""

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    tokenize: Callable[[str, Sequence[Any]], list[int]] | None = None

    def to_vllm(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.images:
            data["image"] = list(self.images)
        if self.videos:
            data["video"] = list(self.videos)
        prompt: dict[str, Any] = {"prompt": self.prompt}
        if self.tokenize:
            prompt = {"prompt_token_ids": self.tokenize(self.prompt, self.images)}
        return prompt | ({"multi_modal_data": data} if data else {})


def asks(family: Family) -> dict[str, Ask]:
    image, video = family.image, family.video
    made = {TEXT: Ask("USER: Tell me a story about nothing at all. ASSISTANT:")}
    if image:
        made[MIDDLE] = Ask(f"USER: Some words before {image}\nWhat is this? ASSISTANT:", (WIDE,))
        made[FIRST] = Ask(f"{image} What is this? ASSISTANT:", (SQUARE,))
        made[TWO] = Ask(f"USER: {image}{image}\nWhat differs? ASSISTANT:", (WIDE, SQUARE))
    if video:
        made[VIDEO] = Ask(f"USER: {video}\nWhat happens? ASSISTANT:", (), ((FRAMES, METADATA),))
    if image and video and family.takes_both:
        text = f"USER: {image} and {video}\nWhich is it? ASSISTANT:"
        made[BOTH] = Ask(text, (WIDE,), ((FRAMES, METADATA),))
    return {kind: replace(ask, tokenize=family.tokenize) for kind, ask in made.items()}


def engine(family: Family, **options: Any) -> dict[str, Any]:
    """Options of an engine for the requests of a family."""
    limits = ({"image": 2} if family.image else {}) | ({"video": 1} if family.video else {})
    return {
        "limit_mm_per_prompt": limits,
        "max_num_batched_tokens": 2048,
        **family.options,
        **options,
    }


def but_one(name: str) -> list[Any]:
    """The families. All but one are slow."""
    return [pytest.param(other, marks=() if other == name else slow) for other in FAMILIES]


def shape(name: str) -> SmallLlava:
    """What a policy file says about a family's checkpoint, in the form of another checkpoint."""
    model_type = {
        "llava_over_pixtral": "llava",
        "eagle": "eagle_2_5_vl",
        "internvl_chat_video": "internvl_chat",
    }.get(name, name)
    return SmallLlava(layers=LAYERS, hidden=HIDDEN, model_type=model_type)


def assert_answers(
    oracle: FamilyOracle,
    family: Family,
    outputs: Sequence[Any],
    layer: int,
    block_size: int,
    keep: float = 0.0,
    ranking: str = "uniform",
) -> None:
    """The answers to `asks(family)` are the oracle's greedy ones, token for token.

    Args:
        oracle: The oracle of the family.
        family: The family.
        outputs: vLLM's outputs.
        layer: The layer before which visual tokens leave.
        block_size: 1 if every visual token leaves, or else the size of the blocks that leave.
        keep: The fraction of each image's and video's tokens that stays.
        ranking: What they are ranked by.
    """
    said, some_leave = set(), False
    for (kind, ask), output in zip(asks(family).items(), outputs, strict=True):
        encoded = oracle.encode(family.for_oracle(ask.prompt), ask.images, ask.videos)
        prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
        assert len(prompt) == len(encoded.ids)
        # A visual token may have another id in vLLM.
        visual = set(encoded.visual)
        assert all(at in visual or token == encoded.ids[at] for at, token in enumerate(prompt))
        leaving = encoded.leaving(family.bridge, block_size, keep, ranking)
        assert block_size > 1 or bool(leaving) == (kind != TEXT)
        some_leave |= bool(leaving)
        assert answer == oracle.logits(encoded, answer, layer, leaving).argmax(-1).tolist(), kind
        said.add(tuple(answer))
    assert some_leave
    assert len(said) == len(outputs)


def assert_ranked_answers(
    oracle: FamilyOracle, family: Family, outputs: Sequence[Any], schedule: Mapping[int, float]
) -> None:
    """The same for a ranked schedule, which says by layer what fraction of visual tokens goes on there."""
    for (kind, ask), output in zip(asks(family).items(), outputs, strict=True):
        encoded = oracle.encode(family.for_oracle(ask.prompt), ask.images, ask.videos)
        answer = output.outputs[0].token_ids
        logits = oracle.ranked_logits(encoded, answer, schedule, encoded.leaving(family.bridge, 1))
        assert list(answer) == logits.argmax(-1).tolist(), kind
