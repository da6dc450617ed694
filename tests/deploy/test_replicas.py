# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Several replicas: the plugin's options, routers that keep an image in one replica, and metrics of all."""

from typing import Any

import yaml

from tests.deploy.options import DEPLOY, assert_withdraws_at_16, parsed

HEADER = "x-session-id"


def described(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_production_stack():
    values = described("production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    args = parsed("serve", model["modelURL"], *model["vllmConfig"]["extraArgs"])
    assert_withdraws_at_16(args.model_impl, args.additional_config)
    assert model["replicaCount"] > 1
    assert model["vllmConfig"]["enablePrefixCaching"]
    assert values["routerSpec"]["routingLogic"] == "session"
    assert values["routerSpec"]["sessionKey"] == HEADER
    for spec in ("servingEngineSpec", "routerSpec"):
        assert values[spec]["serviceMonitor"]["enabled"]


def test_ray_serve():
    (application,) = described("ray-serve.yaml")["applications"]
    (config,) = application["args"]["llm_configs"]
    assert_withdraws_at_16(**config["engine_kwargs"])
    deployment = config["deployment_config"]
    assert deployment["num_replicas"] > 1
    router = deployment["request_router_config"]["request_router_class"]
    assert router.endswith(".ConsistentHashRouter"), f"it goes by the header {HEADER}"


def test_the_header_is_the_one_that_clients_are_told():
    page = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    assert f'extra_headers={{"{HEADER}": ' in page
