"""Small models, made once a session."""

import functools
from collections.abc import Callable

import pytest

from benchmarks.small_llava import SmallLlava
from vllm_vtw.search.llava import Llava


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SmallLlava], Llava]:
    @functools.cache
    def load(model: SmallLlava) -> Llava:
        return Llava(str(model.save(tmp_path_factory.mktemp("model"))), "cpu", "float32")

    return load
