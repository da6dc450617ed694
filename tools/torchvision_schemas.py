# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Lets a CUDA build of torchvision import next to a CPU build of torch.

PyPI has torchvision for CUDA only. Its compiled operators cannot load without CUDA, and importing the
package then fails because it registers fake kernels for operators that nobody declared. vLLM imports
torchvision but calls none of those operators, so declaring their schemas is enough.

`setup_env.py` copies this file into an environment that needs it, with a `.pth` file that imports it when
an interpreter starts: the schemas have to exist before anything imports torchvision, in every process.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Declares the schemas when torchvision is first asked for, then leaves the import to the others."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # A Library drops what it declared when it is collected, so it has to outlive this call.
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)
            _KEEP.append(self)


_KEEP: list[_DeclareBeforeImport] = []
sys.meta_path.insert(0, _DeclareBeforeImport())
