# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of the entry point: loaded twice, switched off, and with a vLLM that is untested or changed."""

import functools
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import vllm
from vllm.model_executor.models import ModelRegistry
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_vtw import plugin
from vllm_vtw.models import registry
from vllm_vtw.versions import TESTED, described
from vllm_vtw.worker import runner_v1


@pytest.fixture
def bare(monkeypatch):
    """Removes the hook from vLLM's registry for the test, and what allows any version of vLLM."""
    monkeypatch.delenv("VLLM_VTW_ALLOW_UNTESTED", raising=False)
    monkeypatch.setattr(plugin, "_warn_once", functools.cache(plugin._warn))
    for target in registry.TARGETS:
        method = getattr(type(ModelRegistry), target)
        monkeypatch.setattr(type(ModelRegistry), target, getattr(method, "__wrapped__", method))
    return monkeypatch


def hooked() -> list[bool]:
    return [hasattr(getattr(ModelRegistry, target), "__wrapped__") for target in registry.TARGETS]


def test_vllm_finds_it():
    (entry,) = entry_points(group="vllm.general_plugins", name="vtw")
    assert entry.load() is plugin.register


def test_metrics_hook_nothing():
    """vLLM imports them in a server of any model."""
    code = """
import sys
import vllm_vtw.metrics
assert not [name for name in sys.modules if name.startswith(("vllm_vtw.kv", "vllm_vtw.worker"))]
from vllm_vtw.kv import groups
assert not hasattr(getattr(groups.planning, groups.TARGET), "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_again_changes_nothing(bare):
    plugin.register()
    assert hooked() == [True, True]
    methods = [getattr(type(ModelRegistry), target) for target in registry.TARGETS]
    plugin.register()
    assert [getattr(type(ModelRegistry), target) for target in registry.TARGETS] == methods


@pytest.mark.parametrize("version", ["0.32.0", "0.99.0"])
def test_the_kill_switch(bare, logged, version):
    bare.setattr(vllm, "__version__", version)
    bare.setenv("VLLM_VTW_DISABLE", "1")
    plugin.register()
    assert hooked() == [False, False]
    (said,) = logged
    assert (said.name, said.levelname) == ("vllm.vtw", "WARNING")
    assert "the plugin does nothing, and --model-impl vtw would serve the stock model" in said.getMessage()


STARTED = """
from multiprocessing import get_context
from vllm.plugins import load_general_plugins

if __name__ == "__main__":
    load_general_plugins()
    load_general_plugins()
    for method in ("spawn", "fork"):
        process = get_context(method).Process(target=load_general_plugins)
        process.start()
        process.join()
    import sys
    print(sorted(name for name in sys.modules if name.startswith("vllm_vtw")))
"""


def test_the_kill_switch_is_told_once_for_all_processes(tmp_path):
    """vLLM loads plugins in every process, and those that it starts inherit the switch."""
    script = tmp_path / "server.py"
    script.write_text(STARTED)
    env = os.environ | {"VLLM_VTW_DISABLE": "1"}
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (ended.stdout + ended.stderr).count("VLLM_VTW_DISABLE=1 is set") == 1
    assert ended.stdout.splitlines()[-1] == "['vllm_vtw', 'vllm_vtw.plugin', 'vllm_vtw.versions']"


@pytest.mark.parametrize("model_impl", ["vtw", "whatever"])
def test_without_the_plugin_vllm_takes_any_name_for_its_own_implementation(bare, model_impl):
    """vLLM then serves the stock model, as the README and `vtw doctor` say."""
    asked = SimpleNamespace(model_impl=model_impl, convert_type="none", _architecture="")
    model, name = ModelRegistry.resolve_model_cls("LlavaForConditionalGeneration", asked)
    assert name == model.__name__ == "LlavaForConditionalGeneration"
    assert model.__module__ == "vllm.model_executor.models.llava"


def ask(model_impl: str) -> str:
    """The architecture that vLLM resolves for `--model-impl`."""
    asked = SimpleNamespace(model_impl=model_impl, convert_type="none", _architecture="")
    return ModelRegistry.inspect_model_cls("LlavaForConditionalGeneration", asked)[1]


@pytest.mark.parametrize("tested", TESTED)
def test_a_vllm_that_was_not_tested_as_released_starts_with_a_warning(bare, logged, tested):
    bare.setattr(vllm, "__version__", f"{tested.version}+cpu")
    plugin.register()
    for model_impl in ("auto", "vtw", "vtw"):
        ask(model_impl)
    warnings = [] if tested.as_released else [f"of vLLM {tested.version}, --model-impl vtw was only tested"]
    assert [said.levelname for said in logged] == ["WARNING"] * len(warnings)
    assert all(warning in said.getMessage() for warning, said in zip(warnings, logged, strict=True))


def test_an_untested_vllm_is_refused_when_vtw_is_asked_for_and_only_then(bare):
    bare.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
    assert ask("auto").startswith("Llava")
    with pytest.raises(RuntimeError, match=re.escape(f"tested with vLLM {described()}, not with 0.99.0")):
        ask("vtw")
    bare.setenv("VLLM_VTW_ALLOW_UNTESTED", "1")
    assert ask("vtw").startswith("VTWLlava")


def test_a_changed_registry_refuses_vtw_and_serves_the_rest(bare):
    def changed(self, model_config):
        return "resolved"

    bare.setattr(type(ModelRegistry), "resolve_model_cls", changed)
    plugin.register()
    assert ModelRegistry.resolve_model_cls(SimpleNamespace(model_impl="auto")) == "resolved"
    with pytest.raises(RuntimeError, match=r"ModelRegistry\.changed: install vLLM 0\.32\.0 or 0\.33\.0"):
        ModelRegistry.resolve_model_cls(model_config=SimpleNamespace(model_impl="vtw"))


def test_a_changed_runner_is_not_hooked(monkeypatch):
    monkeypatch.setattr(GPUModelRunner, runner_v1.TARGET, lambda self, batch: None)
    with pytest.raises(RuntimeError, match=r"does not know this vLLM's GPUModelRunner\._build"):
        runner_v1.install()
