# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Evaluates samples in order. The results of an earlier run are used again if the samples are the same."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from vllm_vtw.search.data.prompts import ModelInputs
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped
from vllm_vtw.search.model import HFModel


class JournaledSample(Protocol):
    """The result of a sample, as a journal holds it."""

    @property
    def inputs_sha256(self) -> str:
        """The `inputs_digest` of the model's inputs for the sample."""


S = TypeVar("S", bound=JournaledSample)


def inputs_digest(inputs: ModelInputs) -> str:
    """The SHA-256 of a model's inputs, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(inputs.tensors):
        # Converted to float32 because numpy has no bfloat16.
        digest.update(inputs.tensors[name].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def evaluate_samples(
    model: HFModel,
    samples: Sequence[Sample],
    limit: int,
    max_tokens: int,
    known: Mapping[str, S],
    file: Path,
    evaluate: Callable[[Sample, ModelInputs, str], S],
) -> Iterator[Skipped | S]:
    """Evaluates samples in their order until `limit` of them could be evaluated.

    Args:
        model: The model, which makes inputs of the samples.
        samples: The samples, in the order in which they are tried.
        limit: The number of results that are wanted.
        max_tokens: The most tokens of an answer.
        known: Results of an earlier run, by `Sample.where`.
        file: The journal that holds the results of `known`. Error messages name it.
        evaluate: Called with a sample that is not in `known`, the model's inputs and their `inputs_digest`.
            It returns the result and stores it in the journal, or raises a `BadSampleError`.

    Yields:
        For each sample its result or, if it cannot be used, the reason.

    Raises:
        ValueError: There is no chat template, or the inputs for a sample of `known` differ from those that
            its result was made with.
    """
    good = 0
    for sample in samples:
        if good == limit:
            return
        try:
            inputs = model.encode(sample, max_tokens)
            digest = inputs_digest(inputs)
            result = known.get(sample.where) or evaluate(sample, inputs, digest)
        except BadSampleError as error:
            yield Skipped(sample.where, error)
            continue
        if result.inputs_sha256 != digest:
            raise ValueError(
                f"--resume: {sample.where} had another image, video or prompt when {file} was made: "
                "restore the data, or give another --out"
            )
        good += 1
        yield result
