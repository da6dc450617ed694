# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The plugin's entry point.

vLLM loads it in each of its processes, and may load it more than once in the same process.
"""

import functools
import logging
import multiprocessing
import os

from vllm_vtw.versions import BEST, described, tested

logger = logging.getLogger("vllm.vtw")


def register() -> None:
    """Makes `--model-impl vtw` known to vLLM.

    If `VLLM_VTW_DISABLE=1` is set, it does nothing but log a warning that says so.
    """
    if os.environ.get("VLLM_VTW_DISABLE") == "1":
        _warn(
            "vtw: VLLM_VTW_DISABLE=1 is set: the plugin does nothing, and --model-impl vtw would serve "
            "the stock model"
        )
        return
    from vllm_vtw.models import registry

    registry.install(guard=check_version)


def check_version() -> None:
    """Refuses a vLLM version that the plugin was not tested with, unless `VLLM_VTW_ALLOW_UNTESTED=1` is set.

    If it was tested otherwise than as it was released, it logs a warning that says how.

    Raises:
        RuntimeError: This vLLM version was not tested.
    """
    import vllm

    found = tested(vllm.__version__)
    if found is not None and not found.as_released:
        _warn_once(
            f"vtw: of vLLM {found.version}, --model-impl vtw was only tested with {found.how}: compare its "
            f"answers with those of vLLM {BEST}, or install that version"
        )
    if found is None and os.environ.get("VLLM_VTW_ALLOW_UNTESTED") != "1":
        raise RuntimeError(
            f"--model-impl vtw was tested with vLLM {described()}, not with {vllm.__version__}: install "
            f"vLLM {BEST}, or set VLLM_VTW_ALLOW_UNTESTED=1 to try this one"
        )


def _warn(message: str) -> None:
    """Logs a warning, but not in the processes that a server starts: these would repeat it."""
    if multiprocessing.parent_process() is None:
        logger.warning(message)


_warn_once = functools.cache(_warn)
