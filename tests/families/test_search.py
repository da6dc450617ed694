# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What searches compute of every family that transformers has, against the oracle."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.families import mrope
from tests.families.checkpoints import CHECKPOINTS, LAYERS
from tests.families.requests import FAMILIES, FIRST, MIDDLE, TWO, VIDEO, asks, slow
from vllm_vtw.search.checkpoint import read_config
from vllm_vtw.search.data.prompts import Prompts
from vllm_vtw.search.data.sample import BadSampleError, Sample
from vllm_vtw.search.model import HFModel, Placement
from vllm_vtw.search.schedules.layerwise import answer_logits
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

ANSWER = 8
CASES = [
    pytest.param(name, name, kind, marks=() if kind in (TWO, VIDEO) else slow)
    for name, family in FAMILIES.items()
    if name in CHECKPOINTS | mrope.CHECKPOINTS and not family.twin_image and family.first == 1
    for kind in (MIDDLE, FIRST, TWO, VIDEO)
    if kind in asks(family) and not (kind == VIDEO and name in mrope.CHECKPOINTS)
]


@pytest.fixture
def model(family_checkpoint, request) -> HFModel:
    name = str(family_checkpoint(request.param))
    config = read_config(name)
    return HFModel(name, config, Placement.of("cpu", "float32", config))


@pytest.mark.parametrize(("model", "name", "kind"), CASES, indirect=["model"])
def test_every_k(model, oracle, tmp_path, name, kind):
    family = FAMILIES[name]
    ask = asks(family)[kind]
    frames = [Image.fromarray(frame) for pixels, _ in ask.videos for frame in pixels]
    images = [*ask.images, *frames]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    files = tuple(f"{number}.png" for number in range(len(images)))
    media: Any = {"images": (), "video": files} if frames else {"images": files}
    prompt = ask.prompt.replace(model.processor.image_token, "<image>")
    sample = Sample("line 1", prompt=prompt, folder=tmp_path, **media)
    encoded = oracle(name).encode(ask.prompt, ask.images, ask.videos)
    leaving = encoded.leaving(family.bridge, 1)
    inputs = model.encode(sample, ANSWER)
    assert inputs.tensors["input_ids"][0].tolist() == encoded.ids
    assert set(inputs.is_visual.nonzero()[:, 0].tolist()) == leaving
    answered = model.answer(inputs, ANSWER)
    layers = list(range(1, LAYERS))
    for layer, logits in zip(layers, model.withdrawn_logits(answered, layers), strict=True):
        wanted = oracle(name).logits(encoded, answered.tokens, layer, leaving)
        torch.testing.assert_close(logits, wanted, atol=5e-4, rtol=5e-4)
    said = model.withdrawn_answer(answered, 2, ANSWER)
    wanted = oracle(name).logits(encoded, said, 2, leaving)
    assert wanted.argmax(-1).tolist() == said
    at_end = SampleAtLayer.of(model, "all", answered).run_layers(model, 0, [1, 1, 0.5, 0.5, 0.1, 0.1])
    wanted = oracle(name).ranked_logits(encoded, answered.tokens, {2: 0.5, 4: 0.1}, leaving)
    torch.testing.assert_close(answer_logits(model, at_end.rows), wanted, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize(
    ("name", "media", "prompt", "said"),
    [
        ("llava_onevision", {"images": ("a.png",)}, "<image><video> What?", "the prompt has <video>, and"),
        (
            "llava_onevision",
            {"images": (), "video": ("a.png",)},
            "<video><image>",
            "the prompt has <image>, and",
        ),
        ("llava_onevision", {"images": (), "video": ("a.png",)}, "What?", "the number of videos is 1"),
        ("llava_next_video", {"images": ("a.png",)}, "<image> What?", "vLLM takes no images for this model"),
        ("qwen2_vl", {"images": (), "video": ("a.png",)}, "<video>", "videos of models with M-RoPE"),
        ("smolvlm", {"images": (), "video": ("a.png",)}, "<video>", "vLLM takes no videos for this model"),
    ],
)
def test_media_that_do_not_fit_are_told(family_checkpoint, tmp_path, name, media, prompt, said):
    folder = str(family_checkpoint(name))
    prompts = Prompts(AutoProcessor.from_pretrained(folder), read_config(folder))
    with pytest.raises(BadSampleError, match=said):
        prompts.text(Sample("line 1", prompt=prompt, folder=tmp_path, **media))


@pytest.mark.parametrize("model", ["mistral3"], indirect=True)
def test_a_sample_that_transformers_cannot_compute_is_a_bad_one(model, tmp_path):
    """An image of one token, which Mistral3's code in transformers takes for no image at all."""
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    inputs = model.encode(Sample("line 1", ("a.png",), "<image> What?", folder=tmp_path), ANSWER)
    assert inputs.is_visual.sum() == 1
    with pytest.raises(BadSampleError, match="transformers cannot compute the sample"):
        model.answer(inputs, ANSWER)
