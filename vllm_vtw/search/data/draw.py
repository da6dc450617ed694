"""The order in which a search looks at samples."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_vtw.search.data.sample import Sample

SEEDS = 1 << 32
"""Seeds are whole numbers less than this, as numpy's and Optuna's samplers take them."""


def draw_samples(samples: "Iterable[Sample]", seed: int) -> "list[Sample]":
    """The samples in random order, the tasks by turns, so that the first few have some of every task."""
    shuffled = list(samples)
    Random(seed).shuffle(shuffled)
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in shuffled:
        by_task[sample.task].append(sample)
    turns = zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [sample for sample in chain.from_iterable(turns) if sample is not None]
