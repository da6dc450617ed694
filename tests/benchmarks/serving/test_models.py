# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The models that benchmarks serve have the sizes that they name, and load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from vllm import SamplingParams

from benchmarks.serving.models import QUARTER, SMALL_QWEN, Model
from benchmarks.serving.setups import WEIGHTS
from tests.engine.engines import running
from vllm_vtw.search.model import active_parameters


def made(folder, model: Model):
    """The model on transformers, without memory for its weights."""
    config = AutoConfig.from_pretrained(model.save(folder))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("model", [QUARTER, SMALL_QWEN, *WEIGHTS], ids=lambda model: model.name)
def test_parameters(tmp_path, model):
    hf_model = made(tmp_path, replace(model, vocab=1024))
    layer = hf_model.get_decoder().layers[-1]
    assert model.layer_parameters(model.experts) == pytest.approx(count(layer), rel=0.01)
    active = active_parameters(layer, hf_model.config.get_text_config())
    assert model.layer_parameters(model.active_experts) == pytest.approx(active, rel=0.01)
    embeddings = 2 * (model.vocab - 1024) * model.hidden
    if model in WEIGHTS:
        assert 2e-9 * (count(hf_model) + embeddings) == pytest.approx(WEIGHTS[model], rel=0.01)


@pytest.mark.parametrize(
    "model_type",
    ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "qwen3_vl_moe"))],
)
def test_images_have_the_visual_tokens_that_are_asked_for(tmp_path, model_type):
    model = Model("tiny", 6, 64, 96, 2, 1024, 2, 8, 720, model_type, kv_heads=1)
    if model_type == "qwen3_vl_moe":
        model = replace(model, experts=4, active_experts=2)
    folder = model.save(tmp_path / "model")
    options = {"load_format": "dummy", "limit_mm_per_prompt": {"image": 1, "video": 0}}
    with running(folder, {"layer": 4, "align": False}, max_num_batched_tokens=2048, **options) as llm:
        for side in (2, 5):
            pixels = np.zeros((model.pixels(side), model.pixels(side), 3), dtype=np.uint8)
            request = {"prompt": model.placeholder, "multi_modal_data": {"image": Image.fromarray(pixels)}}
            (output,) = llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
            assert len(output.prompt_token_ids) == model.visual_tokens(side) + 2
