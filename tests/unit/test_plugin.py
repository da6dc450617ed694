# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tests of the entry point: loaded twice, switched off, and with a vLLM that is untested or changed."""

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
from vllm_vtw.worker import runner_v1


@pytest.fixture
def bare(monkeypatch):
    """Removes the hook from vLLM's registry for the test."""
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
from vllm.v1.core import kv_cache_utils
assert not hasattr(kv_cache_utils._get_kv_cache_groups_uniform_page_size, "__wrapped__")
assert not [name for name in sys.modules if name.startswith(("vllm_vtw.kv", "vllm_vtw.worker"))]
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
    assert ended.stdout.splitlines()[-1] == "['vllm_vtw', 'vllm_vtw.plugin']"


@pytest.mark.parametrize("model_impl", ["vtw", "whatever"])
def test_without_the_plugin_vllm_takes_any_name_for_its_own_implementation(bare, model_impl):
    """vLLM then serves the stock model, as the README and `vtw doctor` say."""
    asked = SimpleNamespace(model_impl=model_impl, convert_type="none", _architecture="")
    model, name = ModelRegistry.resolve_model_cls("LlavaForConditionalGeneration", asked)
    assert name == model.__name__ == "LlavaForConditionalGeneration"
    assert model.__module__ == "vllm.model_executor.models.llava"


def test_an_untested_vllm_is_refused_when_vtw_is_asked_for_and_only_then(bare):
    bare.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
    stock = SimpleNamespace(model_impl="auto", convert_type="none", _architecture="")
    assert ModelRegistry.inspect_model_cls("LlavaForConditionalGeneration", stock)[1].startswith("Llava")
    asked = SimpleNamespace(model_impl="vtw", convert_type="none", _architecture="")
    with pytest.raises(RuntimeError, match=re.escape("tested with vLLM 0.32.0, not with 0.99.0")):
        ModelRegistry.inspect_model_cls("LlavaForConditionalGeneration", asked)
    bare.setenv("VLLM_VTW_ALLOW_UNTESTED", "1")
    assert ModelRegistry.inspect_model_cls("LlavaForConditionalGeneration", asked)[1].startswith("VTWLlava")


def test_a_changed_registry_refuses_vtw_and_serves_the_rest(bare):
    def changed(self, model_config):
        return "resolved"

    bare.setattr(type(ModelRegistry), "resolve_model_cls", changed)
    plugin.register()
    assert ModelRegistry.resolve_model_cls(SimpleNamespace(model_impl="auto")) == "resolved"
    with pytest.raises(RuntimeError, match="does not know this vLLM's ModelRegistry"):
        ModelRegistry.resolve_model_cls(model_config=SimpleNamespace(model_impl="vtw"))


def test_a_changed_runner_is_not_hooked(monkeypatch):
    monkeypatch.setattr(GPUModelRunner, runner_v1.TARGET, lambda self, batch: None)
    with pytest.raises(RuntimeError, match=r"does not know this vLLM's GPUModelRunner\._build"):
        runner_v1.install()
