# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The order in which a search uses samples."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_vtw.search.data.sample import Sample

SEEDS = 1 << 32
"""Seeds are integers from 0 to `SEEDS - 1`, because numpy's and Optuna's samplers take no others."""


def draw_samples(samples: "Iterable[Sample]", seed: int) -> "list[Sample]":
    """Puts samples in a random order in which tasks take turns.

    The first few samples therefore include some of each task. For example, samples of the tasks a, a, a and b
    come in the order a, b, a, a.

    Args:
        samples: The samples of all tasks.
        seed: An integer from 0 to `SEEDS - 1`. The same seed gives the same order.
    """
    shuffled = list(samples)
    Random(seed).shuffle(shuffled)
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in shuffled:
        by_task[sample.task].append(sample)
    turns = zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [sample for sample in chain.from_iterable(turns) if sample is not None]
