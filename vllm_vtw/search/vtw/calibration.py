# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures how a model's answers change at each K, and lets both criteria choose K."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import numpy as np

from vllm_vtw.config import ModelShape
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.data.prompts import ModelInputs
from vllm_vtw.search.data.sample import Sample, Skipped
from vllm_vtw.search.divergence import AnswerDivergence, TaskDivergence
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import STOCK, Price, RequestTokens
from vllm_vtw.search.resume import evaluate_samples
from vllm_vtw.search.vtw.before_decoder import with_fewer_tokens
from vllm_vtw.search.vtw.calibration_journal import CalibrationJournal, CalibrationSettings, MeasuredSample
from vllm_vtw.search.vtw.criteria import answer_layers, first_token_layers


def measure(
    model: HFModel,
    samples: Sequence[Sample],
    limit: int,
    settings: CalibrationSettings,
    journal: CalibrationJournal,
) -> Iterator[Skipped | MeasuredSample]:
    """Measures samples in their order until `limit` of them could be measured.

    Args:
        model: The model that is calibrated.
        samples: The samples, in the order in which they are tried.
        limit: The number of measured samples that are wanted.
        settings: The values of K, and how answers are generated.
        journal: Stores the measured samples. Those that it already has are not measured again.

    Yields:
        For each sample what was measured or, if the sample cannot be used, the reason.

    Raises:
        ValueError: There is no chat template, the model's logits are not finite, or a sample of `journal` had
            another image or prompt when it was measured.
    """

    def evaluate(sample: Sample, inputs: ModelInputs, digest: str) -> MeasuredSample:
        measured = _measure_sample(model, sample, inputs, digest, settings)
        journal.add(measured)
        return measured

    known = journal.measured
    yield from evaluate_samples(model, samples, limit, settings.max_tokens, known, journal.file, evaluate)


def _measure_sample(
    model: HFModel, sample: Sample, inputs: ModelInputs, digest: str, settings: CalibrationSettings
) -> MeasuredSample:
    answered = model.answer(inputs, settings.max_tokens)
    read, at_end, layers = answered, [], settings.layers
    if settings.keep < 1:
        model.prompts.check_ranking(inputs, settings.ranking)
        read, logits = with_fewer_tokens(model, answered, settings.ranking, settings.keep)
        at_end, layers = [logits], layers[:-1]
    return MeasuredSample(
        where=sample.where,
        task=sample.task,
        inputs_sha256=digest,
        prompt=model.prompts.text(sample),
        answer=model.processor.tokenizer.decode(answered.tokens, skip_special_tokens=True).strip(),
        tokens=answered.tokens,
        expected=sample.answer,
        visual_tokens=answered.visual_tokens,
        text_tokens=answered.text_tokens,
        cut=answered.cut,
        differences=[
            AnswerDivergence.between(answered.logits, withdrawn)
            for withdrawn in chain(model.withdrawn_logits(read, layers), at_end)
        ],
    )


def calibrated_policy(layer: int, num_layers: int, keep: float, ranking: str) -> Policy:
    """The policy of a K.

    Args:
        layer: K, or the number of layers if nothing is withdrawn behind layer 0.
        num_layers: The number of decoder layers.
        keep: The share of each image's visual tokens that stays before the decoder.
        ranking: What they are ranked by there.
    """
    deep = Policy.withdraw_at(layer, num_layers)
    return deep if keep == 1 else Policy((Stage(0, keep), *deep.stages), ranked_by=ranking)


@dataclass(frozen=True)
class Budget:
    """The differences from the full model's answers that the criteria allow.

    Attributes:
        eta: First-token criterion: the largest mean KL(P_withdrawn || P_full) of an answer's first token, in
            nats.
        max_answer_kl: Answer criterion: the largest mean KL(P_full || P_withdrawn) of a token, in nats.
        max_token_change: Answer criterion: the largest share of tokens that change, from 0 to 1.
    """

    eta: float
    max_answer_kl: float
    max_token_change: float


def curve(measured: Sequence[MeasuredSample], layers: Sequence[int]) -> dict[int, TaskDivergence]:
    """For each of the measured values of K, how withdrawal there changes the answers to samples.

    Args:
        measured: The samples. There has to be at least one.
        layers: The values of K that were measured.
    """
    return {
        layer: TaskDivergence.of([sample.differences[at] for sample in measured])
        for at, layer in enumerate(layers)
    }


def first_token_kl(measured: Sequence[MeasuredSample], layers: Sequence[int]) -> dict[int, float]:
    """For each of the measured values of K, the mean of `AnswerDivergence.first_token_kl` over samples."""
    return {
        layer: float(np.mean([sample.differences[at].first_token_kl for sample in measured]))
        for at, layer in enumerate(layers)
    }


def mean_price(num_layers: int, model: HFModel, measured: Sequence[MeasuredSample]) -> Price:
    """The `Price` for a request of the mean length of samples."""
    request = RequestTokens(
        *(
            float(np.mean([getattr(sample, name) for sample in measured]))
            for name in ("visual_tokens", "text_tokens", "output_tokens")
        )
    )
    return Price(num_layers, model.layer_parameters, model.attention_width, request)


def result(
    shape: ModelShape,
    model: HFModel,
    settings: CalibrationSettings,
    measured: Sequence[MeasuredSample],
    budget: Budget,
) -> dict[str, Any]:
    """Returns the K that each criterion chooses, and all numbers it is based on, as `result.json` holds them.

    Args:
        shape: The shape of the model.
        model: The model that was measured.
        settings: The settings of the measurement.
        measured: The measured samples. There has to be at least one.
        budget: What the criteria allow.

    Returns:
        An object for JSON. Lists by layer are in the order of `settings.layers`.
    """
    layers, num_layers = settings.layers, shape.num_hidden_layers
    by_task = {
        task: [sample for sample in measured if sample.task == task]
        for task in sorted({sample.task for sample in measured})
    }
    curves = {task: curve(of_task, layers) for task, of_task in by_task.items()}
    first_kl = first_token_kl(measured, layers)
    price = mean_price(num_layers, model, measured)
    of_answer = answer_layers(curves, budget.max_answer_kl, budget.max_token_change)
    of_first_token = first_token_layers(first_kl, budget.eta)
    before = settings.keep, settings.ranking
    policies = [calibrated_policy(layer, num_layers, *before) for layer in layers]
    return {
        "model": shape.as_dict(),
        "made": _provenance(settings, measured),
        "budget": asdict(budget),
        "layer": {
            "answer": next(iter(of_answer), None),
            "first-token": next(iter(of_first_token), None),
        },
        "tasks": {
            task: {
                "samples": len(of_task),
                "tokens": sum(sample.output_tokens for sample in of_task),
                "cut": sum(sample.cut for sample in of_task),
                "expected": sum(sample.expected is not None for sample in of_task),
                "as_expected": sum(sample.expected == sample.answer for sample in of_task),
            }
            for task, of_task in by_task.items()
        },
        "example": {name: getattr(measured[0], name) for name in ("prompt", "answer", "expected")},
        "tokens_per_request": asdict(price.request),
        "before_decoder": dict(zip(("keep", "ranking"), before, strict=True)) if settings.keep < 1 else None,
        "layers": layers,
        "first_token_kl": list(first_kl.values()),
        "curves": {
            task: {
                name: [getattr(point, name) for point in by_layer.values()]
                for name in TaskDivergence.__dataclass_fields__
            }
            for task, by_layer in curves.items()
        },
        "kv_share": [price.kv_share(policy) for policy in policies],
        "prefill_flops_share": [price.flops_share(policy) for policy in policies],
        "prefill_flops": price.prefill_flops(STOCK),
    }


def _provenance(settings: CalibrationSettings, measured: Sequence[MeasuredSample]) -> dict[str, Any]:
    """When, from which samples and with which settings a result was made."""
    inputs = "".join(sample.inputs_sha256 for sample in measured)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": len(measured),
        "samples_sha256": hashlib.sha256(inputs.encode()).hexdigest(),
        **asdict(settings),
    }
