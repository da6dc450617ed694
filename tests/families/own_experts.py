# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Lets vLLM's CPU kernel for experts compute a worker's own experts, as its GPU kernels do.

vLLM 0.32.0 numbers experts over all workers there, and the kernel reads past its weights.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

KERNEL = CPUUnquantizedExperts.apply
workers = 0
"""The number of workers that the experts are spread over, once they have computed something."""


def apply(self: Any, *args: Any, **kwargs: Any) -> None:
    global workers  # noqa: PLW0603
    own = kwargs["expert_map"]
    workers = 1 if own is None else len(own) // int((own >= 0).sum())
    if own is not None:
        ids = own.to(kwargs["topk_ids"].dtype)[kwargs["topk_ids"]]
        weights = kwargs["topk_weights"]
        kwargs |= {"topk_ids": ids.clamp(min=0), "topk_weights": torch.where(ids < 0, 0, weights)}
    KERNEL(self, *args, **kwargs)


CPUUnquantizedExperts.apply = apply


class WorkerExtension:
    """Makes vLLM's workers import this file, and tells how many of them share the experts."""

    def workers_of_experts(self) -> int:
        return workers
