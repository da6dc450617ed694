"""Going through samples: what is there already is not computed again, and has to be of the same sample."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped
from vllm_vtw.search.model import HFModel

Inputs = Mapping[str, torch.Tensor]


class JournaledSample(Protocol):
    """What is known of a sample."""

    @property
    def inputs_sha256(self) -> str:
        """`inputs_digest` of what the model got."""


S = TypeVar("S", bound=JournaledSample)


def inputs_digest(inputs: Inputs) -> str:
    """SHA-256 of what the model gets."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        # numpy has no bfloat16.
        digest.update(inputs[name].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def evaluate_samples(
    model: HFModel,
    samples: Sequence[Sample],
    limit: int,
    max_tokens: int,
    known: Mapping[str, S],
    file: Path,
    look: Callable[[Sample, Inputs, str], S],
) -> Iterator[Skipped | S]:
    """Goes through samples in their order until `limit` are good.

    Args:
        model: Encodes them.
        samples: In their order.
        limit: How many are wanted.
        max_tokens: Of an answer.
        known: By place, what was seen before.
        file: That has it.
        look: Sees a new one, given what the model gets and its digest; keeps it, and may refuse it with a
            `BadSampleError`.

    Yields:
        What is seen of each sample that is good, and why others are not.

    Raises:
        ValueError: A known sample was another one then.
    """
    good = 0
    for sample in samples:
        if good == limit:
            return
        try:
            inputs = model.encode(sample, max_tokens)
            digest = inputs_digest(inputs)
            seen = known.get(sample.where) or look(sample, inputs, digest)
        except BadSampleError as error:
            yield Skipped(sample.where, error)
            continue
        if seen.inputs_sha256 != digest:
            raise ValueError(
                f"--resume: {sample.where} was another picture or prompt when {file} was made: "
                "give another --out"
            )
        good += 1
        yield seen
