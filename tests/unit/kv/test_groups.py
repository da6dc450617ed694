# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The KV-cache groups of a model, in a vLLM that asks its class for them and in one that is hooked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.kv import groups
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy

ALL = FullAttentionSpec(block_size=8, num_kv_heads=1, head_size=32, dtype=torch.float32)
LAYERS = 8


def default_groups(kv_cache_spec: dict[str, KVCacheSpec]) -> list[Any]:
    """In place of vLLM's own split."""
    return ["vLLM's own"]


@pytest.fixture
def vllm(monkeypatch):
    """Makes a stand-in for what the seam looks at: whether vLLM asks models, and its function."""

    def make(asks_models: bool, function: Any = default_groups) -> SimpleNamespace:
        planning = SimpleNamespace(__name__=groups.planning.__name__)
        planning.create_kv_cache_group_specs = groups.planning.create_kv_cache_group_specs
        planning.get_kv_cache_groups = lambda config, specs: getattr(planning, groups.TARGET)(specs)
        if function is not None:
            setattr(planning, groups.TARGET, function)
        monkeypatch.setattr(groups, "planning", planning)
        interfaces = SimpleNamespace(**({groups.ASKS_MODELS: object} if asks_models else {}))
        monkeypatch.setattr(groups, "interfaces", interfaces)
        return planning

    return make


def specs_of(layer: int) -> dict[str, KVCacheSpec]:
    """What the layers of a model say of themselves that withdraws at a layer."""
    split = LayerGroups.of(Policy.withdraw_at(layer, LAYERS), LAYERS)
    return {
        f"layers.{index}": ALL if (group.stage, group.pages) == (0, 1) else StageSpec.like(ALL, split, group)
        for index, group in enumerate(split.by_layer())
    }


def layers(made: list[Any]) -> list[list[str]]:
    return [group.layer_names for group in made]


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_a_hooked_vllm_and_one_that_asks_the_model_make_the_same_groups(vllm, layer: int):
    specs, by_hand = specs_of(layer), LayerGroups.of(Policy.withdraw_at(layer, LAYERS), LAYERS)
    hooked = vllm(asks_models=False)
    groups.install()
    by_hook = hooked.get_kv_cache_groups(None, specs)
    asking = vllm(asks_models=True)
    groups.install()
    assert getattr(asking, groups.TARGET) is default_groups
    assert layers(groups.groups_of(None, specs)) == layers(by_hook)
    assert sorted(map(len, layers(by_hook))) == sorted(group.layers for group in by_hand.groups)


@pytest.mark.parametrize("asks_models", [False, True])
def test_a_model_that_withdraws_nothing_is_split_as_vllm_does(vllm, asks_models: bool):
    planning = vllm(asks_models)
    groups.install()
    specs = dict.fromkeys(("layers.0", "layers.1"), ALL)
    assert planning.get_kv_cache_groups(None, specs) == ["vLLM's own"]
    assert groups.groups_of(None, specs) == ["vLLM's own"]


def test_the_hook_is_there_once(vllm):
    planning = vllm(asks_models=False)
    groups.install()
    hook = getattr(planning, groups.TARGET)
    groups.install()
    assert getattr(planning, groups.TARGET) is hook


@pytest.mark.parametrize("function", [None, lambda kv_cache_spec, more: []])
def test_a_vllm_that_neither_asks_models_nor_has_the_function_is_refused(vllm, function):
    vllm(asks_models=False, function=function)
    with pytest.raises(
        RuntimeError, match=f"does not know this vLLM's {groups.planning.__name__}.{groups.TARGET}"
    ):
        groups.install()
