# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Checkpoints and references, made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.small_llava import SmallLlava
from tests.engine.reference import Reference


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SmallLlava], Path]:
    @functools.cache
    def make(model: SmallLlava) -> Path:
        return model.save(tmp_path_factory.mktemp("checkpoint"))

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    return functools.lru_cache(maxsize=4)(Reference)
