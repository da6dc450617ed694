# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of the files in `deploy/`: vLLM and the plugin understand what they pass on."""

from pathlib import Path
from typing import Any

import yaml
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_vtw.config import ModelShape, VTWConfig

DEPLOY = Path(__file__).parents[2] / "deploy"


def described(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def assert_withdraws(model_impl: str, additional_config: dict[str, Any]) -> None:
    assert model_impl == "vtw"
    model = ModelShape("llava", "llama", 32, 4096, 32064)
    assert VTWConfig.parse(additional_config["vtw"], model, prefix_caching=True).policy.stages


def test_production_stack():
    values = described("production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(model["vllmConfig"]["extraArgs"])
    assert_withdraws(args.model_impl, args.additional_config)
    assert model["vllmConfig"]["enablePrefixCaching"], "requests for one image would share nothing"
    assert values["routerSpec"]["routingLogic"] == "session"


def test_ray_serve():
    (application,) = described("ray-serve.yaml")["applications"]
    (config,) = application["args"]["llm_configs"]
    assert_withdraws(**config["engine_kwargs"])
