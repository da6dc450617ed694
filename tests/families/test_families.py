# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Greedy answers in float32 of every family equal the oracle's, token for token."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams

from tests.engine.engines import free_blocks, running
from tests.families.checkpoints import CHECKPOINTS, LAYERS
from tests.families.oracle import FamilyOracle

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
slow = pytest.mark.slow


@dataclass(frozen=True)
class Family:
    """How prompts of a family say where images and videos are, and what leaves with them."""

    image: str = ""
    video: str = ""
    bridge: int = 0
    twin_image: str = ""

    def for_oracle(self, prompt: str) -> str:
        """The prompt with the placeholders of the twin, if transformers lacks the model."""
        return prompt.replace(self.image, self.twin_image) if self.twin_image else prompt


FAMILIES = {
    "llava_next": Family("<image>"),
    "llava_next_video": Family(video="<video>"),
    "llava_onevision": Family("<image>", "<video>"),
    "internvl": Family("<IMG_CONTEXT>", "<video>"),
    "internvl_chat": Family("<image>", twin_image="<IMG_CONTEXT>"),
    "mistral3": Family("[IMG]", bridge=1),
    "llava_over_pixtral": Family("[IMG]", bridge=1),
    "idefics3": Family("<image>", bridge=5),
    "smolvlm": Family("<image>", bridge=5),
}
"""`bridge` says it again on purpose: the number in the code is tested against it."""


def noise(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


WIDE = tuple(Image.fromarray(noise(seed, 112, 224, 3)) for seed in (1, 2))
FRAMES = noise(3, 4, 56, 56, 3)
METADATA = {
    "fps": 2.0,
    "duration": 2.0,
    "total_num_frames": 4,
    "frames_indices": [0, 1, 2, 3],
    "video_backend": "opencv",
    "do_sample_frames": False,
}
MIDDLE, FIRST, TWO, TEXT, VIDEO = "middle", "first", "two", "text", "video"


@dataclass(frozen=True)
class Ask:
    """A prompt, with its images and videos."""

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def to_vllm(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.images:
            data["image"] = list(self.images)
        if self.videos:
            data["video"] = list(self.videos)
        return {"prompt": self.prompt} | ({"multi_modal_data": data} if data else {})


def asks(family: Family) -> dict[str, Ask]:
    image, video = family.image, family.video
    made = {TEXT: Ask("USER: Tell me a story about nothing at all. ASSISTANT:")}
    if image:
        made[MIDDLE] = Ask(f"USER: Some words before {image}\nWhat is this? ASSISTANT:", WIDE[:1])
        made[FIRST] = Ask(f"{image} What is this? ASSISTANT:", WIDE[1:])
        made[TWO] = Ask(f"USER: {image}{image}\nWhat differs? ASSISTANT:", WIDE)
    if video:
        made[VIDEO] = Ask(f"USER: {video}\nWhat happens? ASSISTANT:", (), ((FRAMES, METADATA),))
    return made


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        return CHECKPOINTS[name](tmp_path_factory.mktemp(name) / "model")

    return make


@pytest.fixture(scope="session")
def oracle(family_checkpoint) -> Callable[[str], FamilyOracle]:
    return functools.lru_cache(maxsize=2)(lambda name: FamilyOracle(family_checkpoint(name)))


@pytest.mark.parametrize(
    "layer", [LAYERS // 2, *(pytest.param(k, marks=slow) for k in (1, LAYERS - 1, LAYERS))]
)
@pytest.mark.parametrize("align", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers(family_checkpoint, oracle, name, align, layer):
    family, block_size = FAMILIES[name], 32
    asked = asks(family)
    limits = {"image": 2} if family.image else {}
    limits |= {"video": 1} if family.video else {}
    options = {
        "block_size": block_size,
        "limit_mm_per_prompt": limits,
        "enable_prefix_caching": align,
        "max_num_batched_tokens": 2048,
        "trust_remote_code": name == "internvl_chat",
    }
    with running(family_checkpoint(name), {"layer": layer, "align": align}, **options) as llm:
        all_free = free_blocks(llm)
        outputs = llm.generate([ask.to_vllm() for ask in asked.values()], GREEDY, use_tqdm=False)
        assert free_blocks(llm) == all_free
    said = set()
    for (kind, ask), output in zip(asked.items(), outputs, strict=True):
        encoded = oracle(name).encode(family.for_oracle(ask.prompt), ask.images, ask.videos)
        assert len(output.prompt_token_ids) == len(encoded.ids)
        assert [
            token == encoded.ids[at] or at in encoded.visual
            for at, token in enumerate(output.prompt_token_ids)
        ] == [True] * len(encoded.ids)
        leaving = encoded.leaving(family.bridge, block_size if align else 1)
        assert bool(leaving) == (kind != TEXT)
        answer = output.outputs[0].token_ids
        assert len(answer) == GREEDY.max_tokens
        expected = oracle(name).logits(encoded, answer, layer, leaving).argmax(-1).tolist()
        assert list(answer) == expected, kind
        said.add(tuple(answer))
    assert len(said) == len(asked)
