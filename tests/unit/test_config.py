# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of the `"vtw"` options: what they resolve to, and how wrong ones are refused."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtw.config import ModelShape, VTWConfig
from vllm_vtw.policy import BY_IMAGE, BY_QUESTION, Gate, Policy, Stage

SMALL = ModelShape("llava", "llama", 8, 64)
POLICY = {
    "format": "vllm-vtw-policy/1",
    "model": {"model_type": "llava", "num_hidden_layers": 8, "hidden_size": 64},
    "stages": [{"layer": 3, "keep": 0.0}, {"layer": 5, "keep": 0}],
    "ranking": None,
    "gate": None,
}
GATE = {"weights": "gates.safetensors", "sha256": "0" * 64, "thresholds": [0.5, 0]}
RANKED = {
    "stages": [{"layer": 3, "keep": 0.5}, {"layer": 5, "keep": 0.1}],
    "ranking": "last-token-attention",
}


def parse(options: object, model: ModelShape = SMALL, prefix_caching: bool = False) -> VTWConfig:
    return VTWConfig.parse(options, model, prefix_caching)


def test_layer_and_align():
    assert parse({"layer": 3}) == VTWConfig(Policy((Stage(3, 0.0),)), align=False, num_layers=8)
    assert parse({"layer": 8}).policy.stages == ()
    assert parse({"layer": 3}, prefix_caching=True).align is True
    assert parse({"layer": 3, "align": False}, prefix_caching=True).align is False


def test_layers_to_choose_from():
    policy = parse({"layers": [5, 3, 8, 5]}).policy
    assert policy.stages == (Stage(3, 0.0), Stage(5, 0.0))
    assert policy.offered_layers(8) == [3, 5, 8]
    assert policy.default_layer == 8
    assert parse({"layers": [5, 3]}).policy.default_layer == 5
    assert [policy.exit_stage(layer) for layer in (3, 5, 8)] == [1, 2, None]
    assert parse({"layers": [3, 5], "layer": 3}).policy.default_layer == 3
    assert parse({"layers": [3, 5], "layer": 8}).policy.default_layer == 8
    assert parse({"layers": [8]}).policy == parse({"layer": 8}).policy
    assert parse({"layer": 3}).policy.offered_layers(8) == [3, 8]
    assert parse({"layer": 3}).policy.default_layer == 3


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize(("layers", "hidden", "published"), [(32, 4096, 16), (40, 5120, 20)])
def test_published_layers(model_type, layers, hidden, published, logged):
    with pytest.raises(ValueError, match="no withdrawal layer is published"):
        parse({}, ModelShape(model_type, "llama", layers, hidden, 128256))  # over Llama 3
    config = parse({}, ModelShape(model_type, "llama", layers, hidden, 32064))
    assert config.policy == Policy.withdraw_at(published, layers)
    (said,) = logged
    assert said.levelname == "INFO"
    assert f"at layer {published}, published for this model" in said.getMessage()
    assert_says_what_it_costs(said.getMessage())


def test_a_model_without_a_published_layer_needs_one():
    with pytest.raises(
        ValueError, match='no withdrawal layer is published for this model, so "layer" or "pol'
    ):
        parse({})
    with pytest.raises(
        ValueError, match="`vtw calibrate MODEL --data FILE` finds a layer K for your own data"
    ):
        parse({"align": False}, ModelShape("llava_onevision", "qwen2", 24, 896))


def assert_says_what_it_costs(message: str) -> None:
    assert "yes/no questions mostly keep their answers there; captions and OCR do not" in message
    assert "MMBench goes from 64.1 to 64.0 and POPE from 85.9 to 86.9" in message
    assert "CIDEr on Flickr30k from 74.9 to 44.5 and OCRBench from 31.5 to 5.2" in message
    assert "`vtw calibrate MODEL --data FILE` finds a layer for your own data" in message
    assert '{"vtw": {"layer": K}}' in message


def test_a_layer_that_was_asked_for_says_nothing(logged):
    parse({"layer": 3})
    assert not logged


def test_a_policy_file(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(POLICY))
    config = parse({"policy": str(file)})
    assert config.policy.stages == (Stage(3, 0.0), Stage(5, 0.0))
    assert config.policy.segments(8) == [range(3), range(3, 5), range(5, 8)]


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 3},
        {"layer": 8},
        {"layer": 3, "align": True},
        {"layers": [5, 3, 8], "layer": 8},
        {"layer": 3, "guard": {"share": 0.01}},
        {"policy": POLICY},
        {"policy": POLICY | {"layer": 3, "tasks": {"ocr": 8, "yes/no": 3}}},
    ],
)
def test_what_is_resolved_reads_the_same_elsewhere(options):
    config = parse(options)
    elsewhere = json.loads(json.dumps(config.resolved(SMALL)))
    assert parse(elsewhere, prefix_caching=True) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, '["vtw"]["layer"] = 0: has to be an integer from 1 to 8'),
        ({"layer": 9}, '["vtw"]["layer"] = 9: has to be an integer from 1 to 8'),
        ({"layer": "4"}, '["vtw"]["layer"] = \'4\': has to be an integer from 1 to 8'),
        ({"layer": 4.0}, '["vtw"]["layer"] = 4.0: has to be an integer from 1 to 8'),
        ({"layer": True}, '["vtw"]["layer"] = True: has to be an integer from 1 to 8'),
        ({"layer": 3, "align": 1}, '["vtw"]["align"] = 1: has to be true or false'),
        ({"K": 4}, '["vtw"]["K"] = 4: unknown key; allowed are layer, layers, policy, align'),
        ({"layers": 4}, '["vtw"]["layers"] = 4: has to be a list of the layers that requests may choose'),
        ({"layers": []}, '["vtw"]["layers"] = []: has to be a list'),
        ({"layers": [2, 9]}, '["vtw"]["layers"] = 9: has to be an integer from 1 to 8'),
        ({"layers": [2, "4"]}, '["vtw"]["layers"] = \'4\': has to be an integer from 1 to 8'),
        (
            {"layers": [2, 4], "layer": 3},
            '["vtw"]["layer"] = 3: has to be one of the "layers": 2, 4, 8 (nothing is withdrawn)',
        ),
        ({"layers": [2, 4], "policy": "p.json"}, 'give either "layers" or "policy", not both'),
        ({"layer": 4, "policy": "p.json"}, 'give either "layer" or "policy", not both'),
        ({"policy": 4}, '["vtw"]["policy"] = 4: has to be the path of a policy file'),
        ({"policy": "nowhere.json"}, '["vtw"]["policy"] = \'nowhere.json\': cannot be read as JSON'),
        ({"layer": 3, "guard": 0.5}, '["vtw"]["guard"] = 0.5: has to be an object with the key "share"'),
        ({"layer": 3, "guard": {"share": 0}}, '"share" has to be a number above 0, and at most 1'),
        ({"layer": 3, "guard": {"share": True}}, '"share" has to be a number above 0, and at most 1'),
        ({"layer": 3, "guard": {"share": 0.5, "to": 1}}, "has to be an object with the key"),
        ([], '["vtw"] = []: has to be an object with keys among layer, layers, policy, align'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "other/1"},
            "not a policy file: expected a JSON object with 'format': 'vllm-vtw-policy/1'",
        ),
        ({"model": {"model_type": "llava", "num_hidden_layers": 32, "hidden_size": 64}}, "for another model"),
        (
            {"ranking": "last-token-attention"},
            "'ranking' = 'last-token-attention': has to be None, as no stage",
        ),
        (
            RANKED | {"ranking": None},
            "'ranking' = None: has to be one of 'last-token-attention', 'key-norm', 'variation', 'uniform',",
        ),
        (RANKED | {"ranking": ["uniform"]}, "'ranking' = ['uniform']: has to be one of"),
        (
            RANKED | {"stages": [{"layer": 0, "keep": 0.5}]},
            "'stages'[0]['layer'] = 0: has to be an integer from 1 to 7, or 0 under 'uniform' or 'random'",
        ),
        (
            {"stages": [{"layer": 0, "keep": 0}], "ranking": "uniform"},
            "'ranking' = 'uniform': has to be None, as no stage has a 'keep' above 0",
        ),
        (
            {"gate": GATE | {"thresholds": [0]}, "ranking": "uniform", "stages": [{"layer": 0, "keep": 0.5}]},
            "'keep' has to be 0 in all of them",
        ),
        ({"gate": {}}, "'gate' has to have exactly the keys"),
        ({"gate": GATE, "stages": [{"layer": 3, "keep": 0.1}]}, "'keep' has to be 0 in all of them"),
        ({"gate": GATE, "stages": []}, "at least one stage in 'stages'"),
        ({"gate": GATE | {"weights": None}}, "'gate'['weights'] = None: has to be a string"),
        ({"gate": GATE | {"thresholds": [1]}}, "= [1]: has to be a list of finite numbers, one for each"),
        (
            {"gate": GATE | {"thresholds": [0, float("nan")]}},
            "= [0, nan]: has to be a list of finite numbers, one for each",
        ),
        ({"layer": 4}, "'layer' = 4: has to be one of 3, 5, 8 (nothing is withdrawn)"),
        ({"layer": 3, "gate": GATE | {"thresholds": [0, 0]}}, "'layer' = 3: has to be left out of a policy"),
        (RANKED | {"layer": 3}, "'layer' = 3: has to be left out of a policy that ranks visual tokens"),
        ({"tasks": ["ocr"]}, "'tasks' = ['ocr']: has to be an object with a layer for each task"),
        ({"tasks": {"ocr": 4}}, "'tasks'['ocr'] = 4: has to be one of 3, 5, 8"),
        ({"tasks": {"": 3}}, "task '': a name has to have from 1 to 64 characters"),
        ({"tasks": {"o\ncr": 3}}, "has to have from 1 to 64 characters"),
        ({"tasks": {"o\x85cr": 3}}, "and none that cannot be printed"),
        (RANKED | {"tasks": {"ocr": 3}}, "'tasks'['ocr'] = 3: has to be one of 8 (nothing is withdrawn)"),
        ({"stages": None}, "'stages' = None: has to be a list of objects"),
        ({"stages": [{"layer": 3}]}, "'stages'[0] has to have exactly the keys 'layer' and 'keep'"),
        ({"stages": [{"layer": 0, "keep": 0}]}, "'stages'[0]['layer'] = 0: has to be an integer from 1 to 7"),
        ({"stages": [{"layer": 8, "keep": 0}]}, "'stages'[0]['layer'] = 8: has to be an integer from 1 to 7"),
        ({"stages": [{"layer": 5, "keep": 0}, {"layer": 3, "keep": 0}]}, "an integer from 6 to 7"),
        ({"stages": [{"layer": 3, "keep": 1}]}, "'keep'] = 1: has to be a number of at least 0 and less"),
        ({"stages": [{"layer": 3, "keep": -0.1}]}, "'keep'] = -0.1: has to be a number of at least 0"),
        ({"stages": [{"layer": 3, "keep": False}]}, "'keep'] = False: has to be a number of at least 0"),
        (
            {"stages": [{"layer": 3, "keep": 0.2}, {"layer": 5, "keep": 0.3}]},
            "'keep'] = 0.3: has to be at most 0.2, the 'keep' of the stage before",
        ),
    ],
)
def test_wrong_policies(change, message, tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(POLICY | change))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        parse({"policy": str(file)})
    assert str(file) in str(refusal.value)


def test_a_gated_policy(tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(POLICY | {"gate": GATE}))
    config = parse({"policy": str(file)}, prefix_caching=True)
    assert config.policy.gate == Gate(str(tmp_path / "gates.safetensors"), "0" * 64, (0.5, 0.0))
    assert config.policy.is_dynamic
    assert not config.align
    elsewhere = json.loads(json.dumps(config.resolved(SMALL)))
    assert parse(elsewhere, prefix_caching=True) == config
    with pytest.raises(
        ValueError, match="has to be false for a policy that ranks visual tokens or has gates"
    ):
        parse({"policy": str(file), "align": True})


@pytest.mark.parametrize("ranking", BY_QUESTION + BY_IMAGE)
def test_a_ranked_policy(tmp_path, ranking):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(POLICY | RANKED | {"ranking": ranking}))
    config = parse({"policy": str(file)})
    assert config.policy.ranking == ranking
    assert config.policy.is_dynamic == (ranking in BY_QUESTION)
    assert config.policy.keeps == (1, 0.5, 0.1)
    assert parse(config.resolved(SMALL)) == config
    # Ranked policies withdraw by tokens, also with prefix caching.
    assert not VTWConfig.parse({"policy": str(file)}, SMALL, prefix_caching=True).align
    with pytest.raises(
        ValueError, match=re.escape('["align"] = True: has to be false for a policy that ranks')
    ):
        parse({"policy": str(file), "align": True})


def test_a_stage_before_the_decoder():
    stages = [{"layer": 0, "keep": 0.25}, {"layer": 5, "keep": 0}]
    content = POLICY | {"stages": stages, "ranking": "uniform"}
    policy = parse({"policy": content}).policy
    assert policy.segments(8) == [range(0), range(5), range(5, 8)]
    assert policy.offered_layers(8) == [8]
    assert policy.default_layer is None
    deepstack = ModelShape("qwen3_vl", "qwen3", 8, 64, first_layer=3)
    content = content | {"model": deepstack.as_dict()}
    with pytest.raises(ValueError, match=r"withdraws at layer 0, and the model adds visual features up to"):
        parse({"policy": content}, deepstack)


@given(st.integers(0, 1000), st.integers(0, 5000))
def test_the_number_of_tokens_that_stay_is_exact(thousandths: int, tokens: int):
    """The fraction is taken as it is written: 0.07 of 100 is 7, though not in floating point."""
    assert Stage(1, thousandths / 1000).kept(tokens) == -(-thousandths * tokens // 1000)
