# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Published configurations: what `vtw doctor`, `vtw plan` and the start-up say of them, without weights."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.families.published import MISTRAL_V01, PUBLISHED
from vllm_vtw.commands.cli import main
from vllm_vtw.commands.doctor import check_model
from vllm_vtw.families import BY_ARCHITECTURE, FAMILIES

TEXT, VISUAL, BLOCK_SIZE = 192, 1024, 16
KV_SHAPE = {
    "llava-hf/llava-1.5-7b-hf": (32, 32, 128),
    "mistral-community/pixtral-12b": (40, 8, 128),
    "llava-hf/llava-v1.6-mistral-7b-hf": (32, 8, 128),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": (32, 32, 128),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (28, 4, 128),
    "OpenGVLab/InternVL2-8B": (32, 8, 128),
    "OpenGVLab/InternVL3-8B-hf": (28, 4, 128),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (40, 8, 128),
    "HuggingFaceTB/SmolVLM-Instruct": (24, 32, 64),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (32, 5, 64),
}
"""Decoder layers, key-value heads and head size."""
WITHOUT_CONFIG = {"llava_onevision2", "pixtral", "eagle_2_5_vl"}
"""The families of which no checkpoint's config.json is known here, by model type."""


def written(folder: Path, content: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def with_text(**changes: Any) -> dict[str, Any]:
    """LLaVA-1.5 with another text model."""
    return PUBLISHED["llava-hf/llava-1.5-7b-hf"] | {"text_config": MISTRAL_V01 | changes}


def configure(folder: str, **options: Any) -> VllmConfig:
    """The configuration of an engine, which is not started."""
    vtw = {"vtw": {"layer": 16}}
    arguments = EngineArgs(
        folder, model_impl="vtw", skip_tokenizer_init=True, additional_config=vtw, **options
    )
    return arguments.create_engine_config()


def test_every_family_is_here():
    assert PUBLISHED.keys() == KV_SHAPE.keys()
    assert PUBLISHED.keys() <= {name for family in FAMILIES for name in family.hub}
    described = {content["model_type"] for content in PUBLISHED.values()}
    assert described | WITHOUT_CONFIG == {family.model_type for family in FAMILIES}
    assert not described & WITHOUT_CONFIG


@pytest.mark.parametrize("name", PUBLISHED)
def test_doctor_finds_it_supported(tmp_path, name):
    content = PUBLISHED[name]
    architecture = content["architectures"][0]
    assert BY_ARCHITECTURE[architecture].model_type == content["model_type"]
    finding, options = check_model(written(tmp_path, content))
    text = content.get("text_config") or content["llm_config"]
    assert finding.found == f"{tmp_path} can be served: {architecture} over {text['model_type']}"
    assert not finding.remedy
    assert ("--trust-remote-code" in options) == ("auto_map" in content)
    assert ('{"layer": K}' in options) == (name != "llava-hf/llava-1.5-7b-hf")


def test_a_search_says_what_it_needs(tmp_path, capsys, monkeypatch):
    folder = written(tmp_path, PUBLISHED["OpenGVLab/InternVL2-8B"])
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "prompt": "What is this?"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["vtw", "gsearch", folder, f"--data={data}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{folder}: transformers lacks this model" in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_computes_with_its_sizes(tmp_path, capsys, monkeypatch, name):
    layers, kv_heads, head_dim = KV_SHAPE[name]
    folder = written(tmp_path, PUBLISHED[name])
    sizes = ["--prompt-tokens", str(TEXT), "--visual-tokens", str(VISUAL), "--output-tokens", "0"]
    command = ["vtw", "plan", folder, "--layer", str(layers // 2), "--json", *sizes]
    monkeypatch.setattr(sys, "argv", command)
    main()
    plan = json.loads(capsys.readouterr().out)
    token = 2 * layers * kv_heads * head_dim * 2
    assert plan["num_hidden_layers"] == layers
    assert plan["kv_bytes_per_text_token"] == {"stock": token, "vtw": token}
    assert plan["kv_bytes_per_image"]["stock"] == VISUAL * token
    taken = plan["kv_bytes_per_request"]
    assert taken["stock"] == (TEXT + VISUAL) * token
    # Whole blocks are withdrawn, so up to two blocks of the image stay in the deep half of the layers.
    least = (TEXT + VISUAL + TEXT) * token // 2
    assert least <= taken["vtw"] <= least + 2 * BLOCK_SIZE * token // 2 < taken["stock"]


@pytest.mark.parametrize("is_left_out", [False, True])
def test_a_published_sliding_window_has_a_way_out(tmp_path, capsys, monkeypatch, is_left_out):
    content = with_text()
    if is_left_out:
        # The class of transformers has the same window by default.
        del content["text_config"]["sliding_window"]
    folder = written(tmp_path, content)
    finding, _ = check_model(folder)
    assert "attends over a sliding window" in finding.found
    assert "--hf-overrides" in finding.remedy
    monkeypatch.setattr(sys, "argv", ["vtw", "plan", folder, "--layer", "16", "--visual-tokens", "576"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "attends over a sliding window" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sliding window") as refusal:
        configure(folder)
    way_out = re.search(r"--hf-overrides '(.*?)'", str(refusal.value))
    assert way_out is not None
    config = configure(folder, hf_overrides=json.loads(way_out[1]))
    assert config.model_config.hf_text_config.sliding_window is None


def test_a_window_that_is_switched_off_is_no_obstacle(tmp_path):
    finding, _ = check_model(written(tmp_path, with_text(sliding_window=None)))
    assert not finding.remedy


def test_a_checkpoint_in_mistrals_format_cannot_be_checked(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    finding, _ = check_model(str(tmp_path))
    assert finding.found.endswith("the folder has no config.json")
    assert "in Mistral's own format, without config.json, cannot be checked" in finding.remedy
