"""Small models, made once a session."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.small_llava import SmallLlava
from vllm_vtw.checkpoint import read_config
from vllm_vtw.search.llava import Llava, Placement


def load_llava(folder: Path) -> Llava:
    """On the CPU, in float32."""
    config = read_config(str(folder))
    return Llava(str(folder), config, Placement.of("cpu", "float32", config))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SmallLlava], Llava]:
    @functools.cache
    def load(model: SmallLlava) -> Llava:
        return load_llava(model.save(tmp_path_factory.mktemp("model")))

    return load
