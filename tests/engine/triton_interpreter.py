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
