# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is refused of models with M-RoPE and deepstack."""

import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.families.requests import FAMILIES, engine, shape
from vllm_vtw.policy import Policy, Stage


def configure(folder, vtw, **options):
    arguments = {"model_impl": "vtw", "additional_config": {"vtw": vtw}, "dtype": "float32", **options}
    return EngineArgs(str(folder), **arguments).create_engine_config()


def test_code_for_one_number_of_tokens_is_refused(family_checkpoint):
    family, options = FAMILIES["qwen2_5_vl"], {"compilation_config": {"compile_sizes": [8]}}
    configure(family_checkpoint("qwen2_5_vl"), {"layer": 3}, **engine(family))
    with pytest.raises(ValueError, match="remove compile_sizes from --compilation-config"):
        configure(family_checkpoint("qwen2_5_vl"), {"layer": 3}, **engine(family, **options))


def test_layers_with_visual_features_keep_visual_tokens(family_checkpoint, tmp_path):
    folder, options = family_checkpoint("qwen3_vl"), engine(FAMILIES["qwen3_vl"])
    configure(folder, {"layer": 2}, **options)
    with pytest.raises(ValueError, match="has to be an integer from 2 to 6"):
        configure(folder, {"layer": 1}, **options)
    file = tmp_path / "policy.json"
    model = {"model_type": "qwen3_vl", "num_hidden_layers": 6, "hidden_size": shape("qwen3_vl").hidden}
    file.write_text(json.dumps(Policy((Stage(1, 0.0),)).to_json(model)))
    with pytest.raises(ValueError, match="the first stage may begin at layer 2"):
        configure(folder, {"policy": str(file)}, **options)
