# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What searches compute of every family that transformers has, against the oracle."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor

from tests.engine.engines import running
from tests.families import mrope
from tests.families.checkpoints import CHECKPOINTS, LAYERS
from tests.families.requests import (
    FAMILIES,
    FIRST,
    GREEDY,
    METADATA,
    MIDDLE,
    TWO,
    VIDEO,
    Ask,
    asks,
    engine,
    noise,
    slow,
)
from tests.search.data.test_videos import film
from vllm_vtw.search.checkpoint import read_config
from vllm_vtw.search.data.prompts import Prompts
from vllm_vtw.search.data.sample import BadSampleError, Sample
from vllm_vtw.search.layerwise import answer_logits
from vllm_vtw.search.model import HFModel, Placement
from vllm_vtw.search.schedules.lower_resolution import affordable_resolution, at_resolution
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer

ANSWER = 8
CASES = [
    pytest.param(name, name, kind, marks=() if kind in (TWO, VIDEO) else slow)
    for name, family in FAMILIES.items()
    if name in CHECKPOINTS | mrope.CHECKPOINTS and not family.twin_image
    for kind in (MIDDLE, FIRST, TWO, VIDEO)
    if kind in asks(family)
]
FRAMES = noise(5, 8, 56, 56, 3)
LISTED = METADATA | {"fps": 1.0, "duration": 8.0, "total_num_frames": 8, "frames_indices": list(range(8))}
"""What vLLM says of a video that is a list of frames."""


@pytest.fixture
def model(family_checkpoint, request) -> HFModel:
    name = str(family_checkpoint(request.param))
    config = read_config(name)
    return HFModel(name, config, Placement.of("cpu", "float32", config))


@pytest.mark.parametrize(("model", "name", "kind"), CASES, indirect=["model"])
def test_every_k(model, oracle, tmp_path, name, kind):
    family = FAMILIES[name]
    ask = asks(family)[kind]
    if ask.videos:
        ask = replace(ask, videos=((FRAMES, LISTED),))
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
    layers = list(range(family.first, LAYERS))
    for layer, logits in zip(layers, model.withdrawn_logits(answered, layers), strict=True):
        wanted = oracle(name).logits(encoded, answered.tokens, layer, leaving)
        torch.testing.assert_close(logits, wanted, atol=5e-4, rtol=5e-4)
    said = model.withdrawn_answer(answered, 2, ANSWER)
    wanted = oracle(name).logits(encoded, said, 2, leaving)
    assert wanted.argmax(-1).tolist() == said
    at_end = SampleAtLayer.of(model, "all", answered).run_layers(model, 0, [1, 1, 0.5, 0.5, 0.1, 0.1])
    wanted = oracle(name).ranked_logits(encoded, answered.tokens, {2: 0.5, 4: 0.1}, leaving)
    torch.testing.assert_close(answer_logits(model, at_end.rows), wanted, atol=5e-4, rtol=5e-4)
    first = family.first if family.first > 1 else 0
    asked = SampleAtLayer.of(model, "all", answered)
    for ranking in ("uniform", "diversity"):
        if ranking == "diversity" and not leaving <= set(encoded.visual):
            # The engine keeps what is between the rows of an image, which has no features.
            with pytest.raises(BadSampleError, match="the tokens between an image's rows"):
                model.prompts.check_ranking(inputs, ranking)
            continue
        model.prompts.check_ranking(inputs, ranking)
        keeps = [1.0] * first + [0.3] * (LAYERS - first)
        at_end = asked.ranked_by(ranking).run_layers(model, 0, keeps)
        wanted = oracle(name).logits(
            encoded, answered.tokens, first, encoded.leaving(family.bridge, 1, 0.3, ranking)
        )
        torch.testing.assert_close(answer_logits(model, at_end.rows), wanted, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_the_same_picture_at_a_lower_resolution(model, oracle, tmp_path):
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (224, 280, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    name = model.config.model_type
    family = FAMILIES[name]
    prompt = asks(family)[MIDDLE].prompt.replace(model.processor.image_token, "<image>")
    sample = Sample("line 1", ("a.png",), prompt, folder=tmp_path)
    answered = model.answer(model.encode(sample, ANSWER), ANSWER)
    asked = SampleAtLayer.of(model, "all", answered)
    tried: list[float] = []

    def half(keep: float) -> bool:
        tried.append(keep)
        return keep <= 0.5

    visual = answered.visual_tokens
    found = affordable_resolution(model, [sample], visual, ANSWER, half)
    assert found is not None
    assert 0.3 < found.keep <= 0.5
    assert len(tried) < 8
    image = sample.load_images()[0]
    small = image.resize((round(280 * found.scale), round(224 * found.scale)), Image.Resampling.LANCZOS)
    encoded = oracle(name).encode(asks(family)[MIDDLE].prompt, [small])
    assert len(encoded.visual) == pytest.approx(found.keep * visual)
    wanted = oracle(name).logits(encoded, answered.tokens, LAYERS, set())
    smaller = at_resolution(model, sample, asked, ANSWER, found.scale)
    at_end = smaller.run_layers(model, 0, [1.0] * LAYERS)
    torch.testing.assert_close(answer_logits(model, at_end.rows), wanted, atol=5e-4, rtol=5e-4)
    torch.testing.assert_close(smaller.logits, asked.logits)
    assert affordable_resolution(model, [sample], visual, ANSWER, lambda keep: False) is None
    assert affordable_resolution(model, [sample], visual, ANSWER, lambda keep: True) is None


@pytest.mark.parametrize(
    "name", ["qwen3_vl", *(pytest.param(n, marks=slow) for n in ("qwen2_5_vl", "glm4v"))]
)
def test_a_video_file_is_the_same_prompt_as_in_vllm(family_checkpoint, tmp_path, name):
    """One of which all frames are taken, and others."""
    folder, family = family_checkpoint(name), FAMILIES[name]
    processor, prompt = AutoProcessor.from_pretrained(folder), asks(family)[VIDEO].prompt
    prompts = Prompts(processor, read_config(str(folder)))
    backend = get_video_loader_backend_for_processor(type(processor.video_processor).__name__)
    loader = VideoMediaIO(ImageMediaIO(), video_backend=backend)
    with running(folder, {"layer": 3, "align": False}, **engine(family)) as llm:
        for count, rate in ((8, 2), (16, 10), (50, 10)):
            file = film(tmp_path, count, rate)
            video = loader.load_file(tmp_path / file).media
            (output,) = llm.generate([Ask(prompt, (), (video,)).to_vllm()], GREEDY, use_tqdm=False)
            sample = Sample("line 1", (), prompt, video=file, folder=tmp_path)
            assert prompts.inputs(sample, 1).tensors["input_ids"][0].tolist() == output.prompt_token_ids


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
        ("smolvlm", {"images": (), "video": ("a.png",)}, "<video>", "vLLM takes no videos for this model"),
        ("qwen2_vl", {"images": (), "video": ("a.png",)}, "<video><image>", "the prompt has <image>, and"),
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
    with pytest.raises(BadSampleError, match="transformers cannot compute an image of one visual token"):
        model.encode(Sample("line 1", ("a.png",), "<image> What?", folder=tmp_path), ANSWER)
