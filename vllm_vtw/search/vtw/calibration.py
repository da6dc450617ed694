"""Measures a model's answers at every K, and lets both criteria choose."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vllm_vtw.config import ModelShape
from vllm_vtw.policy import Policy
from vllm_vtw.search.data.sample import Sample, Skipped
from vllm_vtw.search.divergence import Curve, Difference
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import STOCK, Price, RequestTokens
from vllm_vtw.search.resume import Inputs, evaluate_samples
from vllm_vtw.search.vtw.criteria import answer_layer, first_token_layer
from vllm_vtw.search.vtw.journal import CalibrationJournal, CalibrationSettings, MeasuredSample


def measure(
    model: HFModel,
    samples: Sequence[Sample],
    limit: int,
    settings: CalibrationSettings,
    progress: CalibrationJournal,
) -> Iterator[Skipped | MeasuredSample]:
    """Goes through samples in their order until `limit` are good. What `progress` has is not computed again.

    Yields:
        Each sample that is good, and why others are not.

    Raises:
        ValueError: A sample of `progress` was another one then.
    """

    def look(sample: Sample, inputs: Inputs, digest: str) -> MeasuredSample:
        measured = _measured(model, sample, inputs, digest, settings)
        progress.add(measured)
        return measured

    known = progress.measured
    yield from evaluate_samples(model, samples, limit, settings.max_tokens, known, progress.file, look)


def _measured(
    model: HFModel, sample: Sample, inputs: Inputs, digest: str, settings: CalibrationSettings
) -> MeasuredSample:
    answered = model.answer(inputs, settings.max_tokens)
    return MeasuredSample(
        where=sample.where,
        task=sample.task,
        inputs_sha256=digest,
        prompt=model.prompts.text(sample),
        answer=model.processor.tokenizer.decode(answered.tokens, skip_special_tokens=True).strip(),
        expected=sample.answer,
        visual_tokens=answered.visual_tokens,
        text_tokens=answered.text_tokens,
        cut=answered.cut,
        differences=[
            Difference.between(answered.logits, withdrawn)
            for withdrawn in model.withdrawn_logits(answered, settings.layers)
        ],
    )


@dataclass(frozen=True)
class Budget:
    """What a criterion allows: see `criteria`."""

    eta: float
    max_answer_kl: float
    max_token_change: float


def result(
    shape: ModelShape,
    model: HFModel,
    settings: CalibrationSettings,
    measured: Sequence[MeasuredSample],
    budget: Budget,
) -> dict[str, Any]:
    """Both criteria's choices of K with all they are made of, ready for JSON."""
    layers, num_layers = settings.layers, shape.num_hidden_layers
    by_task = {
        task: [sample for sample in measured if sample.task == task]
        for task in sorted({sample.task for sample in measured})
    }
    curves = {
        task: {
            layer: Curve.of([sample.differences[at] for sample in of_task]) for at, layer in enumerate(layers)
        }
        for task, of_task in by_task.items()
    }
    first_kl = {
        layer: float(np.mean([sample.differences[at].first_token_kl for sample in measured]))
        for at, layer in enumerate(layers)
    }
    request = RequestTokens(
        *(
            float(np.mean([getattr(sample, name) for sample in measured]))
            for name in ("visual_tokens", "text_tokens", "output_tokens")
        )
    )
    price = Price(num_layers, model.layer_parameters, shape.hidden_size, request)
    policies = [Policy.withdraw_at(layer, num_layers) for layer in layers]
    return {
        "model": shape.as_dict(),
        "made": _made(settings, measured),
        "budget": asdict(budget),
        "layer": {
            "answer": answer_layer(curves, budget.max_answer_kl, budget.max_token_change),
            "first-token": first_token_layer(first_kl, budget.eta),
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
        "tokens_per_request": asdict(request),
        "layers": layers,
        "first_token_kl": list(first_kl.values()),
        "curves": {
            task: {
                name: [getattr(curve, name) for curve in by_layer.values()]
                for name in Curve.__dataclass_fields__
            }
            for task, by_layer in curves.items()
        },
        "kv_share": [price.kv_share(policy) for policy in policies],
        "prefill_flops_share": [price.flops_share(policy) for policy in policies],
        "prefill_flops": price.prefill_flops(STOCK),
    }


def _made(settings: CalibrationSettings, measured: Sequence[MeasuredSample]) -> dict[str, Any]:
    inputs = "".join(sample.inputs_sha256 for sample in measured)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": len(measured),
        "samples_sha256": hashlib.sha256(inputs.encode()).hexdigest(),
        **asdict(settings),
    }
