# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plugin's entry point.

vLLM loads it in each of its processes, and may load it more than once in the same process.
"""

import logging
import multiprocessing
import os

logger = logging.getLogger("vllm.vtw")

SUPPORTED_VLLM = ("0.32.0",)
"""The vLLM versions that the plugin was tested with."""


def register() -> None:
    """Makes `--model-impl vtw` known to vLLM.

    If `VLLM_VTW_DISABLE=1` is set, it does nothing but log a warning that says so.
    """
    if os.environ.get("VLLM_VTW_DISABLE") == "1":
        # The server's child processes (engines, workers) load the plugin too and would repeat the warning.
        if multiprocessing.parent_process() is None:
            logger.warning(
                "vtw: VLLM_VTW_DISABLE=1 is set: the plugin does nothing, and --model-impl vtw would serve "
                "the stock model"
            )
        return
    from vllm_vtw.models import registry

    registry.install(guard=check_version)


def check_version() -> None:
    """Refuses a vLLM version that the plugin was not tested with, unless `VLLM_VTW_ALLOW_UNTESTED=1` is set.

    Raises:
        RuntimeError: This vLLM version was not tested.
    """
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in SUPPORTED_VLLM and os.environ.get("VLLM_VTW_ALLOW_UNTESTED") != "1":
        raise RuntimeError(
            f"--model-impl vtw was tested with vLLM {', '.join(SUPPORTED_VLLM)}, not with {version}: install "
            "that version, or set VLLM_VTW_ALLOW_UNTESTED=1 to try this one"
        )
