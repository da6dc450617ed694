# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Small models, data, a calibration, a search and gates, made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.data import write_data
from benchmarks.quality.tasks import TASKS
from benchmarks.small_llava import SmallLlava
from tests.search.command import SAMPLES, TRAIN, Ended, calibrate, dyvte, searched
from vllm_vtw.search.checkpoint import read_config
from vllm_vtw.search.model import HFModel, Placement


def load_llava(folder: Path) -> HFModel:
    """On the CPU, in float32."""
    config = read_config(str(folder))
    return HFModel(str(folder), config, Placement.of("cpu", "float32", config))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SmallLlava], HFModel]:
    @functools.cache
    def load(model: SmallLlava) -> HFModel:
        return load_llava(model.save(tmp_path_factory.mktemp("model")))

    return load


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), list(TASKS), SAMPLES)


@pytest.fixture(scope="session")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A calibration on all samples."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    return out, calibrate(data, out)


@pytest.fixture(scope="session")
def gsearched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A G-Search."""
    out = tmp_path_factory.mktemp("gsearch") / "out"
    return out, searched("gsearch", data, out, "--max-token-change=0.05", "--max-answer-kl=0.1")


@pytest.fixture(scope="session")
def gates(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Gates that were trained."""
    out = tmp_path_factory.mktemp("dyvte") / "out"
    return out, dyvte("train", data, out, *TRAIN)
