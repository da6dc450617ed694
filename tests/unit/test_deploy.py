# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of the files in `deploy/`: the plugin's options, and routers that keep an image in one replica."""

from pathlib import Path
from typing import Any

import yaml
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_vtw.config import ModelShape, VTWConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
HEADER = "x-session-id"


def described(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def assert_withdraws_at_16(model_impl: str, additional_config: dict[str, Any]) -> None:
    assert model_impl == "vtw"
    model = ModelShape("llava", "llama", 32, 4096, 32064)
    assert VTWConfig.parse(additional_config["vtw"], model, prefix_caching=True).policy.default_layer == 16


def test_production_stack():
    values = described("production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(model["vllmConfig"]["extraArgs"])
    assert_withdraws_at_16(args.model_impl, args.additional_config)
    assert model["replicaCount"] > 1
    assert model["vllmConfig"]["enablePrefixCaching"]
    assert values["routerSpec"] == {"routingLogic": "session", "sessionKey": HEADER}


def test_ray_serve():
    (application,) = described("ray-serve.yaml")["applications"]
    (config,) = application["args"]["llm_configs"]
    assert_withdraws_at_16(**config["engine_kwargs"])
    deployment = config["deployment_config"]
    assert deployment["num_replicas"] > 1
    router = deployment["request_router_config"]["request_router_class"]
    assert router.endswith(".ConsistentHashRouter"), f"it goes by the header {HEADER}"


def test_the_header_is_the_one_that_clients_are_told():
    assert f'extra_headers={{"{HEADER}": ' in (DEPLOY.parent / "README.md").read_text()
