# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The short tails against running the whole model anew for every K, and what they cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from benchmarks.small_llava import SmallLlava
from tests.search.conftest import load_llava
from tests.search.plain import plain_logits
from vllm_vtw.search.data.sample import Sample
from vllm_vtw.search.divergence import AnswerDivergence
from vllm_vtw.search.vtw.criteria import first_token_layers

ANSWER = 10
PROMPTS = {
    "one": "USER: <image>\nWhat is in this image? ASSISTANT:",
    "two": "USER: <image>\n<image>\nWhich one has the cats? ASSISTANT:",
    "apart": "<image>\nTell me about mountains, <image>\nand clouds.",
    "at the end": "What is in this image? <image>",
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two, of sizes that LLaVA-NeXT tiles otherwise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (200, 320, 3)), ("b.png", (300, 150, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    return folder


def sample(prompt: str, folder: Path) -> Sample:
    return Sample("line 1", ("a.png", "b.png")[: prompt.count("<image>")], prompt, folder=folder)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    ("model_type", "backbone"),
    [("llava", "llama"), ("llava", "qwen2"), ("llava_next", "mistral"), ("llava_next", "llama")],
)
def test_every_k_is_what_the_whole_model_gives(llava, pictures, model_type, backbone, prompt):
    shape = SmallLlava(layers=7, kv_heads=1, image_side=4, backbone=backbone, model_type=model_type)
    loaded = llava(shape)
    plain = AutoModelForImageTextToText.from_pretrained(
        loaded.config._name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = loaded.encode(sample(prompt, pictures), ANSWER)
    answered = loaded.answer(inputs, ANSWER)
    full = plain_logits(plain, inputs.tensors, answered.tokens, 7)
    assert full.argmax(-1).tolist() == answered.tokens
    visual = int((inputs.tensors["input_ids"] == plain.config.image_token_index).sum())
    assert visual >= 16 * prompt.count("<image>")
    assert answered.visual_tokens == visual - prompt.endswith("<image>")
    assert answered.text_tokens + answered.visual_tokens == inputs.tensors["input_ids"].shape[1]
    layers = list(range(1, 7))
    first_kl, wanted_kl = {}, {}
    for layer, logits in zip(layers, loaded.withdrawn_logits(answered, layers), strict=True):
        wanted = plain_logits(plain, inputs.tensors, answered.tokens, layer)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
        found = AnswerDivergence.between(answered.logits, logits)
        first_kl[layer], wanted_kl[layer] = found.first_token_kl, published_kl(full, wanted)
        assert first_kl[layer] == pytest.approx(wanted_kl[layer], abs=1e-5, rel=0)
    assert max(first_kl.values()) > 1e-3  # there is something to agree on
    eta = sorted(wanted_kl.values())[0]
    assert first_token_layers(first_kl, eta + 1e-5) == first_token_layers(wanted_kl, eta + 1e-5)


def published_kl(full: torch.Tensor, withdrawn: torch.Tensor) -> float:
    p, q = (torch.softmax(logits[0].double(), -1) for logits in (withdrawn, full))
    return float((p * (p.log() - q.log())).sum())


def test_answers_are_greedy_whatever_the_checkpoint_says(pictures, tmp_path):
    folder = SmallLlava(layers=3, image_side=4).save(tmp_path)
    plain = load_llava(folder)
    inputs = plain.encode(sample(PROMPTS["one"], pictures), ANSWER)
    wanted = plain.answer(inputs, ANSWER).tokens
    told = {"eos_token_id": 2, "pad_token_id": 3, "suppress_tokens": [wanted[1]], "temperature": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(told | {"do_sample": True}))
    answered = load_llava(folder).answer(inputs, ANSWER)
    assert answered.tokens == wanted
    assert answered.tokens == answered.logits.argmax(-1).tolist()


def test_some_values_of_k_are_the_same_as_among_all(llava, pictures):
    loaded = llava(SmallLlava(layers=7, kv_heads=1, image_side=4))
    answered = loaded.answer(loaded.encode(sample(PROMPTS["two"], pictures), ANSWER), ANSWER)
    every = list(loaded.withdrawn_logits(answered, range(1, 7)))
    some = list(loaded.withdrawn_logits(answered, [2, 5]))
    torch.testing.assert_close(some, [every[1], every[4]], atol=1e-4, rtol=1e-4)


def test_the_search_computes_a_fifth_of_the_plain_one_at_most(llava, pictures):
    """At the lengths of LLaVA-1.5 and 32 layers, in tokens through decoder layers."""
    loaded = llava(SmallLlava(layers=32, image_side=24, hidden=32))
    prompt = "<image>\n" + "Tell me about mountains, clouds. " * 6
    inputs = loaded.encode(sample(prompt, pictures), 1)
    visual = int((inputs.tensors["input_ids"] == loaded.config.image_token_index).sum())
    assert (visual, inputs.tensors["input_ids"].shape[1] // 10) == (576, 64)
    rows = 0

    def count(layer, args, states):
        nonlocal rows
        rows += states.shape[0] * states.shape[1]

    layers = list(range(5, 32))
    hooks = [layer.register_forward_hook(count) for layer in loaded.decoder.layers]
    answered = loaded.answer(inputs, 1)
    ours = list(loaded.withdrawn_logits(answered, layers))
    rows, ours_rows = 0, rows
    for layer, logits in zip([*layers, 32], [*ours, answered.logits], strict=True):
        wanted = plain_logits(loaded.hf_model, inputs.tensors, answered.tokens, layer)
        torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)
    for hook in hooks:
        hook.remove()
    assert rows >= 5 * ours_rows
