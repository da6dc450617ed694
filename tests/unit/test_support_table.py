# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The documentation's table of models is the one that the plugin uses, and tests keep what it promises."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vllm.model_executor.models import ModelRegistry

from tests.families import mrope, vllm_only
from tests.families.checkpoints import CHECKPOINTS
from tests.families.requests import FAMILIES as TESTED
from tools.support_table import table
from vllm_vtw import families
from vllm_vtw.families import (
    BY_MODEL_TYPE,
    ELSEWHERE,
    FAMILIES,
    WHY_NOT,
    WINDOW_REMEDY,
    how_to_find_a_layer,
    text_refusal,
)
from vllm_vtw.models import served

NAMES = {name for family in FAMILIES for name in family.hub}


def test_the_documentation_has_the_table():
    page = Path(__file__).parents[2] / "docs/models.md"
    assert table() in page.read_text(encoding="utf-8")


def test_every_family_is_tested():
    named = {"llava_over_pixtral": "llava", "eagle": "eagle_2_5_vl", "internvl_chat_video": "internvl_chat"}
    made = CHECKPOINTS.keys() | mrope.CHECKPOINTS.keys() | vllm_only.CHECKPOINTS.keys()
    assert made == TESTED.keys()
    assert {named.get(name, name) for name in made} == BY_MODEL_TYPE.keys()
    for name, family in TESTED.items():
        assert family.bridge == BY_MODEL_TYPE[named.get(name, name)].bridge


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_transformers_has_these_models(family):
    assert family.in_transformers == (family.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert family.in_transformers or not family.twin or family.twin in NAMES
    can_calibrate = how_to_find_a_layer(family.model_type).startswith("`vtw calibrate MODEL")
    assert can_calibrate == family.in_transformers


@pytest.mark.parametrize("architecture", [*(family.architecture for family in FAMILIES), *WHY_NOT])
def test_vllm_has_these_architectures(architecture):
    assert architecture in ModelRegistry.models


def test_text_models():
    # Only the attribute has the type of a text model in Mistral's own format.
    mistral = PretrainedConfig.from_dict({"model_type": "transformer", "hidden_size": 64})
    assert mistral.to_dict()["model_type"] != "transformer"
    assert text_refusal("transformer", mistral.to_dict()) is None
    window = {"sliding_window": 32768}
    for unused in ({"use_sliding_window": False}, {}):
        assert text_refusal("qwen2", window | unused) is None
    # Qwen's layers have windows each, so an override would not switch them off.
    assert str(text_refusal("qwen2", window | {"use_sliding_window": True})).endswith(f": {ELSEWHERE}")
    assert str(text_refusal("mistral", window)).endswith(f": {WINDOW_REMEDY}")
    assert str(text_refusal("granite", {})).startswith("the text model is 'granite'")


def test_a_class_that_makes_others_is_not_served(monkeypatch):
    monkeypatch.setitem(families.BY_ARCHITECTURE, "MiniCPMV", FAMILIES[0])
    with pytest.raises(ValueError, match="MiniCPMV: vLLM's class may make objects of other classes"):
        served.VTWMiniCPMV  # noqa: B018 - the class is made when it is asked for
