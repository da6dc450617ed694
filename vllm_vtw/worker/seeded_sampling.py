# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Generators for seeded requests on the CPU, which model runner V1 can wind back."""

from typing import Any

import numpy as np
import torch


class RewindableGenerator(torch.Generator):
    """A CPU generator that can return to the state it was made in.

    Model runner V1 samples a token of every row, also of a row whose prompt is computed only in part. It
    throws that token away and takes the draw back by subtracting from the generator's offset. CUDA generators
    have an offset. CPU generators have none, so in stock vLLM a seeded request whose prompt is cut ends the
    engine.

    Args:
        generator: The generator whose numbers this one continues.
    """

    def __new__(cls, generator: torch.Generator) -> "RewindableGenerator":
        return super().__new__(cls)  # torch.Generator.__new__ takes a device, by default the CPU

    def __init__(self, generator: torch.Generator) -> None:
        self._start = generator.get_state()
        self.set_state(self._start)

    def get_offset(self) -> int:
        """Always 0. The offset of a CPU generator is only asked for in order to wind it back."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Returns to the start, whatever the offset is: one step makes one draw."""
        return self.set_state(self._start)


def make_rewindable(runner: Any, num_reqs: int) -> None:
    """Replaces the generators of seeded rows whose sampled token this step throws away.

    Args:
        runner: A model runner V1 on the CPU that is about to run a step.
        num_reqs: Rows of the batch.
    """
    generators = runner.input_batch.generators
    if not generators:
        return
    for row in np.flatnonzero(runner.discard_request_mask.np[:num_reqs]).tolist():
        if row in generators:
            generators[row] = RewindableGenerator(generators[row])
            runner.requests[runner.input_batch.req_ids[row]].generator = generators[row]
