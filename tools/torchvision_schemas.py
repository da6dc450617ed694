# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes a CUDA build of torchvision importable with a CPU build of torch.

PyPI has torchvision for CUDA only. Its compiled operators cannot be loaded without CUDA. The import of the
package then fails, because it registers fake kernels for operators that were not declared. vLLM imports
torchvision but calls none of these operators, so it is enough to declare their schemas.

In every process, the schemas have to be declared before torchvision is imported. `setup_env.py` therefore
copies this file into an environment that needs it, with a `.pth` file that imports it when Python starts.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Declares the schemas at the first import of torchvision, which other finders then complete."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # The schemas are removed when the Library is garbage-collected, so it has to be kept.
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)
            _KEEP.append(self)


_KEEP: list[_DeclareBeforeImport] = []
sys.meta_path.insert(0, _DeclareBeforeImport())
