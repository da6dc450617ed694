# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Checkpoints and oracles of families, made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.checkpoints import CHECKPOINTS
from tests.families.oracle import FamilyOracle


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        return CHECKPOINTS[name](tmp_path_factory.mktemp(name) / "model")

    return make


@pytest.fixture(scope="session")
def oracle(family_checkpoint) -> Callable[[str], FamilyOracle]:
    return functools.lru_cache(maxsize=2)(lambda name: FamilyOracle(family_checkpoint(name)))
