# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Token ids and pixels against those of vLLM's renderer, which is what its endpoints make of a request."""

import base64
import functools
import io
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoProcessor, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config

from benchmarks.small_llava import CHAT_TEMPLATE, SmallLlava
from tests.search.command import calibrate, found, vtw
from vllm_vtw.search.data.prompts import Prompts
from vllm_vtw.search.data.sample import Message, Sample

PICTURE = Image.effect_noise((70, 40), 80).convert("LA")
STRINGS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PRINTED = STRINGS.replace("message['content'] | trim", "message['content'] | string")
TEMPLATES = {
    "parts": CHAT_TEMPLATE,
    "parts, with the first token": "{{ bos_token }}" + CHAT_TEMPLATE,
    "strings": STRINGS,
    "strings, with the first token": "{{ bos_token }}" + PRINTED,
}
IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}
CHATS: dict[str, list[Message]] = {
    "one": [{"role": "user", "content": [IMAGE, WHAT]}],
    "behind": [{"role": "user", "content": [WHAT, IMAGE, {"type": "text", "text": "Which?"}]}],
    "turns": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [IMAGE, WHAT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, IMAGE]},
    ],
}
WHOLE = ["USER: <image>\nWhat? ASSISTANT:", "<s>USER: <image><image>\nWhat? ASSISTANT:", "What? <image>"]


def data_url() -> str:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A small model whose tokenizer writes a first token, or none, with a template of the processor's or the
    tokenizer's own."""

    @functools.cache
    def save(template: str, writes_first: bool, of_processor: bool = True) -> Path:
        folder = SmallLlava(layers=2, image_side=4).save(tmp_path_factory.mktemp("model"))
        if writes_first:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            tokenizer.post_processor = post
            tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").unlink()
        if of_processor:
            (folder / "chat_template.jinja").write_text(TEMPLATES[template])
        else:
            change(folder / "tokenizer_config.json", chat_template=TEMPLATES[template])
        return folder

    return save


def change(file: Path, **values: Any) -> None:
    """Sets keys of a JSON file, or with None takes them away."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def loaded(folder: Path) -> Prompts:
    return Prompts(AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder))


class VLLM:
    """What vLLM's endpoints make of requests, without an engine."""

    def __init__(self, folder: Path) -> None:
        limits = {"limit_mm_per_prompt": {"image": 4}, "mm_processor_cache_gb": 0}
        config = EngineArgs(str(folder), dtype="float32", max_model_len=512, **limits).create_engine_config()
        self.renderer = renderer_from_config(config)

    def chat(self, messages: list[Message]) -> tuple[list[int], torch.Tensor]:
        """As `/v1/chat/completions` has its defaults."""
        url = {"type": "image_url", "image_url": {"url": data_url()}}
        asked = [
            message | {"content": [url if part == IMAGE else part for part in message["content"]]}
            for message in messages
        ]
        given = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
        tokens = self.renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        _, (made,) = self.renderer.render_chat([asked], given, tokens)
        return self._made(made)

    def whole(self, prompt: str) -> tuple[list[int], torch.Tensor]:
        """As `LLM.generate` has its defaults; `/v1/completions` has the same."""
        asked = {"prompt": prompt, "multi_modal_data": {"image": [PICTURE] * prompt.count("<image>")}}
        (made,) = self.renderer.render_cmpl([asked])
        return self._made(made)

    @staticmethod
    def _made(made: Any) -> tuple[list[int], torch.Tensor]:
        pixels = [item.get_data()["pixel_values"] for item in made["mm_kwargs"]["image"]]
        return made["prompt_token_ids"], torch.stack(pixels)


def of_ours(prompts: Prompts, sample: Sample) -> tuple[list[int], torch.Tensor]:
    inputs = prompts.inputs(sample, 8).tensors
    return inputs["input_ids"][0].tolist(), inputs["pixel_values"]


def sample(chat: list[Message] | str) -> Sample:
    if isinstance(chat, str):
        return Sample("line 1", (data_url(),) * chat.count("<image>"), chat)
    return Sample("line 1", (data_url(),) * sum(m["content"].count(IMAGE) for m in chat), None, tuple(chat))


@pytest.mark.parametrize(
    ("template", "writes_first", "of_processor"),
    [*product(TEMPLATES, (True, False), (True,)), ("parts", True, False), ("strings", True, False)],
)
def test_the_model_gets_what_vllm_gives_it(checkpoint, template, writes_first, of_processor):
    folder = checkpoint(template, writes_first, of_processor)
    prompts, vllm = loaded(folder), VLLM(folder)
    try:
        for messages in CHATS.values():
            (ids, pixels), (wanted, seen) = of_ours(prompts, sample(messages)), vllm.chat(messages)
            assert ids == wanted
            assert (ids[0] == 1) == ("first token" in template)
            torch.testing.assert_close(pixels, seen)
        for prompt in WHOLE:
            (ids, pixels), (wanted, seen) = of_ours(prompts, sample(prompt)), vllm.whole(prompt)
            assert ids == wanted
            assert ids[:2].count(1) == writes_first + prompt.startswith("<s>")
            torch.testing.assert_close(pixels, seen)
    finally:
        vllm.renderer.shutdown()
    chats = "Chats were measured without <s>" in " ".join(prompts.notes)
    assert chats == (writes_first and "first token" not in template)
    assert any("with two of it" in note for note in prompts.notes) == writes_first
    assert len(prompts.notes) == chats + writes_first


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        PICTURE.save(folder / f"{number}.png")
    return folder


def test_the_report_and_the_terminal_say_that_the_first_token_is_missing(checkpoint, pictures, tmp_path):
    loose = ("--max-token-change=1", "--max-answer-kl=99", "--max-tokens=2", "--limit=8")
    folder = checkpoint("parts", True)
    said = "Chats were measured without &lt;s&gt; before them"
    for prompt, there in (("What?", True), ("USER: <image>\nWhat? ASSISTANT:", False)):
        out = tmp_path / prompt[:4]
        ended = calibrate(pictures, out, *loose, "--prompt", prompt, model=folder)
        assert ended.status == 0, ended.err
        assert (said in (out / "report.html").read_text()) == there
        assert (said.replace("&lt;", "<").replace("&gt;", ">") in ended.out) == there
        assert any("measured without" in note for note in found(out)["notes"]) == there


@pytest.mark.parametrize(
    "command",
    [["gsearch", "--max-token-change=1"], ["psigmoid", "--budget=1", "--trials=1"], ["dyvte", "train"]],
    ids=lambda command: command[0],
)
def test_the_other_searches_say_it_too(checkpoint, pictures, tmp_path, command):
    out = tmp_path / "out"
    options = [f"--data={pictures}", f"--out={out}", "--prompt=What is this?", "--max-tokens=2"]
    ended = vtw(*command, str(checkpoint("parts", True)), *options)
    assert "Chats were measured without <s>" in ended.out, ended.err
    assert "Chats were measured without &lt;s&gt;" in (out / "report.html").read_text()


KEYS = ["num_additional_image_tokens", "patch_size", "vision_feature_select_strategy"]


@pytest.mark.parametrize("missing", [*([key] for key in KEYS), KEYS], ids=str)
def test_what_an_old_processor_does_not_say_is_taken_from_the_model(checkpoint, tmp_path, missing):
    folder = checkpoint("parts", False)
    wanted = of_ours(loaded(folder), sample(CHATS["one"]))
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    change(old / "processor_config.json", **dict.fromkeys(missing))
    ids, pixels = of_ours(loaded(old), sample(CHATS["one"]))
    assert ids == wanted[0]
    assert ids.count(4) == 16
    torch.testing.assert_close(pixels, wanted[1])


@given(
    st.sampled_from([CLIPVisionConfig, SiglipVisionConfig]),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 13),
    st.sampled_from(["default", "full"]),
)
def test_an_image_has_as_many_tokens_as_vllm_counts(kind, side, patch, over, strategy):
    # vLLM takes CLIP's pictures in whole patches only.
    size = side * patch + (over % patch if kind is SiglipVisionConfig else 0)
    vision = kind(image_size=size, patch_size=patch)
    config = LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy)
    processor = SimpleNamespace(chat_template=None, tokenizer=SimpleNamespace(chat_template=None))
    Prompts(processor, config)
    counted = (size // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    counted -= processor.vision_feature_select_strategy == "default"
    of_tower = get_vision_encoder_info(config).get_num_image_tokens(image_width=1, image_height=1)
    assert counted == get_num_selected_vision_tokens(of_tower, strategy)


def test_without_a_chat_template_whole_prompts_are_asked_for(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("parts", False), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template: give whole prompts"):
        loaded(folder).text(sample(CHATS["one"]))
