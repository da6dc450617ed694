# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Published configurations: what `vtw doctor`, `vtw plan` and the start-up say of them, without weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, SmolVLMImageProcessorPil, SmolVLMProcessor, SmolVLMVideoProcessor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.engine.engines import BLOCK_SIZE as ENGINE_BLOCK
from tests.engine.engines import held_blocks, running, scheduler_of, step_until
from tests.families.checkpoints import idefics_tokenizer
from tests.families.published import MISTRAL_V01, PUBLISHED
from tests.search.command import vtw
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
    "Qwen/Qwen2-VL-7B-Instruct": (28, 4, 128),
    "Qwen/Qwen2.5-VL-7B-Instruct": (28, 4, 128),
    "Qwen/Qwen3-VL-8B-Instruct": (36, 8, 128),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (48, 4, 128),
    "zai-org/GLM-4.1V-9B-Thinking": (40, 2, 128),
    "zai-org/GLM-4.5V": (46, 8, 128),
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
    finding, options, _ = check_model(written(tmp_path, content))
    if text := content.get("text_config") or content.get("llm_config"):
        decoder = text["model_type"]
    else:
        # The text model's keys stand at the top level. transformers moves them.
        decoder = AutoConfig.from_pretrained(tmp_path).text_config.model_type
    assert finding.found == f"{tmp_path} can be served: {architecture} over {decoder}"
    assert not finding.remedy
    has_deepstack = "K has to be at least 3, because of deepstack" in finding.remark
    assert has_deepstack == name.startswith("Qwen/Qwen3-VL")
    assert ("--trust-remote-code" in options) == ("auto_map" in content)
    assert ('{"layer": K}' in options) == (name != "llava-hf/llava-1.5-7b-hf")


def test_a_search_says_what_it_needs(tmp_path):
    folder = written(tmp_path, PUBLISHED["OpenGVLab/InternVL2-8B"])
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "prompt": "What is this?"}) + "\n")
    ended = vtw("gsearch", folder, f"--data={data}")
    assert ended.status == 2
    assert f"{folder}: transformers cannot read this format" in ended.err


def planned(folder: str, *options: str) -> dict[str, Any]:
    ended = vtw("plan", folder, "--json", *options)
    assert ended.status == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_computes_with_its_sizes(tmp_path, name):
    layers, kv_heads, head_dim = KV_SHAPE[name]
    folder = written(tmp_path, PUBLISHED[name])
    sizes = ("--prompt-tokens", str(TEXT), "--visual-tokens", str(VISUAL), "--output-tokens", "0")
    plan = planned(folder, "--layer", str(layers // 2), *sizes)
    token = 2 * layers * kv_heads * head_dim * 2
    assert plan["num_hidden_layers"] == layers
    assert plan["kv_bytes_per_text_token"] == {"stock": token, "vtw": token}
    assert plan["kv_bytes_per_image"]["stock"] == VISUAL * token
    taken = plan["kv_bytes_per_request"]
    assert taken["stock"] == (TEXT + VISUAL) * token
    # Whole blocks are withdrawn, so up to two blocks of the image stay in the deep half of the layers.
    least = (TEXT + VISUAL + TEXT) * token // 2
    assert least <= taken["vtw"] <= least + 2 * BLOCK_SIZE * token // 2 < taken["stock"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [16, 28])
def test_an_engine_of_these_sizes_holds_what_is_planned(tmp_path, layer):
    """SmolVLM2-500M, with weights that vLLM makes up, and with a small tokenizer."""
    tokenizer = idefics_tokenizer()
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    folder = written(tmp_path, PUBLISHED["HuggingFaceTB/SmolVLM2-500M-Video-Instruct"] | ids)
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(**sizes), tokenizer, SmolVLMVideoProcessor(), image_seq_len=64
    )
    processor.save_pretrained(folder)
    image = {"prompt": "USER: <image> What?", "multi_modal_data": {"image": Image.new("RGB", (1024, 768))}}
    options = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 1},
        "kv_cache_memory_bytes": 512 << 20,
    }
    with running(Path(folder), {"layer": layer}, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        llm.llm_engine.add_request("0", image, params)
        held = {}

        def look() -> None:
            # The last token of the answer is never computed.
            for request in scheduler_of(llm).running:
                if request.num_output_tokens == 8:
                    held.update(held_blocks(llm))

        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), look)
        page = scheduler_of(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    asked = ("--layer", str(layer), "--block-size", str(ENGINE_BLOCK), "--no-enable-prefix-caching")
    visual = planned(folder, *asked)["request"]["tokens_per_image"]
    assert visual > 13 * 64  # 4 x 3 tiles and the whole image, with the names of the tiles
    text = len(outputs["0"].prompt_token_ids) - visual
    plan = planned(folder, *asked, "--prompt-tokens", str(text), "--output-tokens", "8")
    (blocks,) = held.values()
    taken = sum(map(len, blocks)) * plan["layers_per_group"] * page
    assert taken == plan["kv_bytes_per_request"]["vtw"]


@pytest.mark.parametrize("is_left_out", [False, True])
def test_a_published_sliding_window_has_a_way_out(tmp_path, is_left_out):
    content = with_text()
    if is_left_out:
        # The class of transformers has the same window by default.
        del content["text_config"]["sliding_window"]
    folder = written(tmp_path, content)
    finding = check_model(folder).finding
    assert "attends over a sliding window" in finding.found
    assert "--hf-overrides" in finding.remedy
    ended = vtw("plan", folder, "--layer", "16", "--visual-tokens", "576")
    assert ended.status == 2
    assert "attends over a sliding window" in ended.err
    with pytest.raises(ValueError, match="sliding window") as refusal:
        configure(folder)
    way_out = re.search(r"--hf-overrides '(.*?)'", str(refusal.value))
    assert way_out is not None
    config = configure(folder, hf_overrides=json.loads(way_out[1]))
    assert config.model_config.hf_text_config.sliding_window is None


def test_a_window_that_is_switched_off_is_no_obstacle(tmp_path):
    finding = check_model(written(tmp_path, with_text(sliding_window=None))).finding
    assert not finding.remedy


def test_a_checkpoint_in_mistrals_format_cannot_be_checked(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    finding, _, was_read = check_model(str(tmp_path))
    assert not was_read
    assert finding.found.endswith("the folder has no config.json")
    assert "in Mistral's own format, without config.json, cannot be checked here" in finding.remedy


def test_a_broken_configuration_is_not_taken_for_mistrals_format(tmp_path):
    (tmp_path / "config.json").write_text("{")
    finding, _, was_read = check_model(str(tmp_path))
    assert not was_read
    assert finding.remedy == "check the name"


def test_a_checkpoint_in_both_formats(tmp_path):
    """vLLM would read Mistral's own format, whose model type, in policy files, is another one."""
    folder = written(tmp_path, PUBLISHED["mistralai/Mistral-Small-3.1-24B-Instruct-2503"])
    assert "--config-format" not in check_model(folder).options
    (tmp_path / "params.json").write_text("{}")
    save_file({"norm.weight": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    finding, options, _ = check_model(folder)
    assert "vLLM would take Mistral's own format" in finding.remark
    assert " --config-format hf " in options
    assert configure(folder, config_format="hf").model_config.hf_config.model_type == "mistral3"


def test_the_documentation_has_these_numbers(tmp_path):
    page = (Path(__file__).parents[2] / "docs/capacity.md").read_text(encoding="utf-8")
    for name in (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
    ):
        folder, layers = written(tmp_path, PUBLISHED[name]), KV_SHAPE[name][0]
        cells = [f"{name.removeprefix('Qwen/').removesuffix('-Instruct')}, {layers} layers"]
        for layer in (layers // 2, 3 * layers // 4, 7 * layers // 8):
            fit = planned(folder, "--layer", str(layer), "--visual-tokens", "1024")["max_sequences"]
            cells += [f"{fit['stock']}"] if len(cells) == 1 else []
            cells.append(f"K = {layer}: x {fit['vtw'] / fit['stock']:.2f}")
        assert f"| {' | '.join(cells)} |" in page
