"""The entry point that vLLM loads in every one of its processes, each time it may already have been."""

import logging
import multiprocessing
import os

logger = logging.getLogger("vllm.vtw")

SUPPORTED_VLLM = ("0.32.0",)


def register() -> None:
    """Makes `--model-impl vtw` known to vLLM. Under `VLLM_VTW_DISABLE=1` it only logs that it does not."""
    if os.environ.get("VLLM_VTW_DISABLE") == "1":
        # Engines and workers are processes that the server starts, and load the plugin, too.
        if multiprocessing.parent_process() is None:
            logger.warning(
                "vtw: VLLM_VTW_DISABLE=1 is set: the plugin does nothing, and --model-impl vtw would serve "
                "the stock model"
            )
        return
    from vllm_vtw.models import registry

    registry.install(guard=check_version)


def check_version() -> None:
    """Refuses a vLLM that the plugin was not tested with, unless `VLLM_VTW_ALLOW_UNTESTED=1`.

    Raises:
        RuntimeError: Names both versions and the ways out.
    """
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in SUPPORTED_VLLM and os.environ.get("VLLM_VTW_ALLOW_UNTESTED") != "1":
        raise RuntimeError(
            f"--model-impl vtw was tested with vLLM {', '.join(SUPPORTED_VLLM)}, not with {version}: install "
            "that version, or set VLLM_VTW_ALLOW_UNTESTED=1 to try this one"
        )
