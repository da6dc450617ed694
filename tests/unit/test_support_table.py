# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""README's table of models is the one that the plugin uses, and tests keep what it promises."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig
from vllm.model_executor.models import ModelRegistry

from tests.families.checkpoints import CHECKPOINTS
from tests.families.requests import FAMILIES as TESTED
from tools.support_table import table
from vllm_vtw import families
from vllm_vtw.families import BY_MODEL_TYPE, FAMILIES, WHY_NOT, text_refusal
from vllm_vtw.models import served


def test_readme_has_the_table():
    readme = Path(__file__).parents[2] / "README.md"
    assert table() in readme.read_text(encoding="utf-8")


def test_families_that_are_said_to_be_tested_are():
    named = {"llava_over_pixtral": "llava"}
    tested = {named.get(name, name) for name in TESTED}
    assert CHECKPOINTS.keys() == TESTED.keys()
    assert {family.model_type for family in FAMILIES if family.is_tested} == tested
    for name, family in TESTED.items():
        assert family.bridge == BY_MODEL_TYPE[named.get(name, name)].bridge


@pytest.mark.parametrize("architecture", [*(family.architecture for family in FAMILIES), *WHY_NOT])
def test_vllm_has_these_architectures(architecture):
    assert architecture in ModelRegistry.models


def test_text_models():
    # Only the attribute has the type of a text model in Mistral's own format.
    mistral = PretrainedConfig.from_dict({"model_type": "transformer", "hidden_size": 64})
    assert mistral.to_dict()["model_type"] != "transformer"
    assert text_refusal("transformer", mistral.to_dict()) is None
    window = {"sliding_window": 32768}
    assert text_refusal("qwen2", window | {"use_sliding_window": False}) is None
    assert "sliding window" in (text_refusal("qwen2", window) or "")
    assert "the text model is 'granite'" in (text_refusal("granite", {}) or "")


def test_a_class_that_makes_others_is_not_served(monkeypatch):
    monkeypatch.setitem(families.BY_ARCHITECTURE, "MiniCPMV", FAMILIES[0])
    with pytest.raises(ValueError, match="MiniCPMV: vLLM's class may make objects of other classes"):
        served.VTWMiniCPMV  # noqa: B018 - the class is made when it is asked for
