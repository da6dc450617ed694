"""What vLLM's CPU backend lacks for seeded requests: generators that take a draw back."""

from typing import Any

import numpy as np
import torch


class RewindableGenerator(torch.Generator):
    """A CPU generator that takes back what was drawn since it was made.

    Model runner V1 samples in every row, also where a step takes a part of a prompt only. It throws that
    token away, and takes the draw back by winding the generator's offset back. CUDA's generators have one.
    The CPU's have none, so there a seeded request whose prompt is cut ends vLLM's engine, with the plugin or
    without it.

    Args:
        generator: Whose numbers it goes on with.
    """

    def __new__(cls, generator: torch.Generator) -> "RewindableGenerator":
        return super().__new__(cls)  # on the CPU

    def __init__(self, generator: torch.Generator) -> None:
        self._start = generator.get_state()
        self.set_state(self._start)

    def get_offset(self) -> int:
        """Of the numbers drawn so far, which nobody asks a CPU generator for but to wind it back."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Goes back to the start, whatever the offset: one step draws once."""
        return self.set_state(self._start)


def allow_taking_back(runner: Any, num_reqs: int) -> None:
    """Gives the seeded rows whose token this step throws away a generator that takes its draw back.

    Args:
        runner: A model runner V1 on the CPU, which is about to run a step.
        num_reqs: Rows of the batch.
    """
    generators = runner.input_batch.generators
    if not generators:
        return
    for row in np.flatnonzero(runner.discard_request_mask.np[:num_reqs]).tolist():
        if row in generators:
            generators[row] = RewindableGenerator(generators[row])
            runner.requests[runner.input_batch.req_ids[row]].generator = generators[row]
