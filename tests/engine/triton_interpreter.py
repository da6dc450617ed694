# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Lets model runner V2 run on a CPU: its Triton kernels go through Triton's interpreter.

Import it before vLLM. vLLM's CPU build asks for a Triton backend named "cpu" whose driver is active; PyPI's
Triton has none, and the interpreter needs none.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

from triton.runtime.interpreter import InterpreterBuilder


def masks_as_booleans(name: str) -> None:
    """The interpreter gives a mask that met an integer the integer's type, and then refuses it."""
    original = getattr(InterpreterBuilder, name)
    index = {"create_masked_load": 1, "create_masked_store": 2}[name]

    def masked(self, *args):
        args[index].data = args[index].data.astype(bool)
        return original(self, *args)

    setattr(InterpreterBuilder, name, masked)


masks_as_booleans("create_masked_load")
masks_as_booleans("create_masked_store")
