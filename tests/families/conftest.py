# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Checkpoints and oracles of families, made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import mrope, vllm_only
from tests.families.checkpoints import CHECKPOINTS
from tests.families.oracle import FamilyOracle
from tests.families.requests import FAMILIES, asks, engine
from tests.families.vllm_oracle import VLLMOracle


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        made = CHECKPOINTS | mrope.CHECKPOINTS | vllm_only.CHECKPOINTS
        return made[name](tmp_path_factory.mktemp(name) / "model")

    return make


@pytest.fixture(scope="session")
def oracle(family_checkpoint) -> Callable[[str], FamilyOracle]:
    @functools.lru_cache(maxsize=2)
    def make(name: str) -> FamilyOracle:
        folder, family = family_checkpoint(name), FAMILIES[name]
        if name not in vllm_only.VISUAL_TOKENS:
            return FamilyOracle(folder)
        return VLLMOracle(folder, vllm_only.VISUAL_TOKENS[name], asks(family).values(), engine(family))

    return make
