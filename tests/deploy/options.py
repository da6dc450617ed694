# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What vLLM and the plugin make of the options in the files of `deploy/`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_vtw.config import ModelShape, VTWConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def parsed(*arguments: str) -> Namespace:
    """What `vllm` reads from its arguments, the first of which is `serve`."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser.parse_args([*arguments])


def assert_withdraws_at_16(model_impl: str, additional_config: dict[str, Any]) -> None:
    assert model_impl == "vtw"
    model = ModelShape("llava", "llama", 32, 4096, 32064)
    assert VTWConfig.parse(additional_config["vtw"], model, prefix_caching=True).policy.default_layer == 16
