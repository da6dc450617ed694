# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Skips this folder where there is no GPU that vLLM can use."""

import pytest
import torch

from tests.engine.conftest import checkpoint, reference

__all__ = ["checkpoint", "reference"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and vLLM's CUDA build"))
