# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's split of layers into KV-cache groups, by which a spec can choose their size."""

import functools
import inspect
from collections import defaultdict
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

TARGET = "_get_kv_cache_groups_uniform_page_size"
EXTENSION_POINT = "layers_per_group"
"""The method of a KV-cache spec that returns the number of layers in a group, for each spec of a model."""


def install() -> None:
    """Wraps vLLM's function that splits layers into groups, so that it calls the specs' `layers_per_group`.

    Does nothing if vLLM calls it by itself (`patches/kv-cache-groups.diff`).

    Raises:
        RuntimeError: The function is not the one that the wrapper was written for.
    """
    if hasattr(KVCacheSpec, EXTENSION_POINT):
        return
    original = getattr(kv_cache_utils, TARGET, None)
    if getattr(original, "asks_specs", False):
        return
    if original is None or list(inspect.signature(original).parameters) != ["kv_cache_spec"]:
        raise RuntimeError(f"vllm-vtw does not know this vLLM's kv_cache_utils.{TARGET}: install vLLM 0.32.0")

    @functools.wraps(original)
    def split(kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
        chosen: Any = [getattr(spec, EXTENSION_POINT, None) for spec in kv_cache_spec.values()]
        choose = next(filter(None, chosen), None)
        if choose is None:
            return original(kv_cache_spec)
        layers: dict[KVCacheSpec, list[str]] = defaultdict(list)
        for name, spec in kv_cache_spec.items():
            layers[spec].append(name)
        groups = []
        for names, size in zip(layers.values(), choose(list(layers)), strict=True):
            count = -(-len(names) // size)
            groups += [names[group::count] for group in range(count)]
        return kv_cache_utils.create_kv_cache_group_specs(kv_cache_spec, groups)

    split.asks_specs = True  # type: ignore[attr-defined]
    setattr(kv_cache_utils, TARGET, split)
