"""Measures a model's answers at every K, sample by sample, in a folder that keeps what was done."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from vllm_vtw.config import Model
from vllm_vtw.search.criteria import Curve, Difference, answer_layer, first_token_layer
from vllm_vtw.search.data import BadSampleError, Sample
from vllm_vtw.search.llava import Llava
from vllm_vtw.search.price import Request, kv_share, prefill_flops


@dataclass(frozen=True)
class Settings:
    """What samples have to have in common to be looked at together.

    Attributes:
        checkpoint: The model's name or folder.
        config_sha256: Of its configuration.
        data_sha256: Of the data, as `data_digest` has it.
        seed: Of the order that samples are drawn in.
        layers: Values of K, ascending.
        max_tokens: Of an answer.
        dtype: Of the weights.
    """

    checkpoint: str
    config_sha256: str
    data_sha256: str
    seed: int
    layers: list[int]
    max_tokens: int
    dtype: str


@dataclass(frozen=True)
class Measured:
    """One sample's answer by the full model, and what withdrawal does to it, by position in `layers`."""

    where: str
    task: str
    prompt: str
    answer: str
    expected: str | None
    visual_tokens: int
    text_tokens: int
    differences: list[Difference]

    @property
    def output_tokens(self) -> int:
        return len(self.differences[0].changed)


class Progress:
    """The measured samples of a folder: a file of JSON lines, the settings first.

    Raises:
        ValueError: The folder's samples were measured otherwise, or `resume` was not asked for.
    """

    def __init__(self, folder: Path, settings: Settings, resume: bool) -> None:
        self.file = folder / "samples.jsonl"
        self.measured: list[Measured] = []
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        if len(lines) < 2:
            self.file.write_text(json.dumps(asdict(settings)) + "\n")
        elif not resume:
            raise ValueError(f"{folder} holds a calibration: go on with --resume, or give another --out")
        else:
            self._take(lines, settings)

    def add(self, measured: Measured) -> None:
        self.measured.append(measured)
        self._append(asdict(measured))

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        content = self.file.read_text() if self.file.exists() else ""
        whole = content[: content.rfind("\n") + 1]
        if whole != content:  # it was killed while it wrote
            self.file.write_text(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, lines: list[dict[str, Any]], settings: Settings) -> None:
        head, *rest = lines
        for name, now in asdict(settings).items():
            if head.get(name) != now:
                raise ValueError(
                    f"--resume: {self.file} was made with {name} {head.get(name)!r}, and now it is {now!r}: "
                    "give the same as then, or another --out"
                )
        for line in rest:
            differences = [Difference(**difference) for difference in line.pop("differences")]
            self.measured.append(Measured(**line, differences=differences))


def data_digest(path: Path, prompt: str | None) -> str:
    """SHA-256 of a data file; of a folder, of the prompt and of the names and contents of its files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256((prompt or "").encode())
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def measure(
    llava: Llava, samples: Sequence[Sample], limit: int, settings: Settings, progress: Progress
) -> Iterator[BadSampleError | Measured]:
    """Measures samples in their order until `limit` are done, those of `progress` among them.

    Yields:
        Each sample that was measured now, and why others could not be.
    """
    done = {measured.where for measured in progress.measured}
    for sample in samples:
        if len(progress.measured) >= limit:
            return
        if sample.where in done:
            continue
        try:
            inputs = llava.encode(sample, settings.max_tokens)
        except BadSampleError as error:
            yield BadSampleError(f"{sample.where}: {error}")
            continue
        answered = llava.answer(inputs, settings.max_tokens)
        measured = Measured(
            where=sample.where,
            task=sample.task,
            prompt=llava.prompt(sample),
            answer=llava.processor.tokenizer.decode(answered.tokens, skip_special_tokens=True).strip(),
            expected=sample.answer,
            visual_tokens=answered.visual_tokens,
            text_tokens=answered.text_tokens,
            differences=[
                Difference.between(answered.logits, withdrawn)
                for withdrawn in llava.withdrawn_logits(answered, settings.layers)
            ],
        )
        progress.add(measured)
        yield measured


@dataclass(frozen=True)
class Budget:
    """What a criterion allows: see `criteria`."""

    eta: float
    max_answer_kl: float
    max_token_change: float


def result(
    model: Model, layer_parameters: int, settings: Settings, measured: Sequence[Measured], budget: Budget
) -> dict[str, Any]:
    """Both criteria's choices of K with all they are made of, ready for JSON."""
    layers, num_layers = settings.layers, model.num_hidden_layers
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
    request = Request(
        *(
            float(np.mean([getattr(sample, name) for sample in measured]))
            for name in ("visual_tokens", "text_tokens", "output_tokens")
        )
    )

    def flops(layer: int) -> float:
        return prefill_flops(layer, num_layers, request, layer_parameters, model.hidden_size)

    return {
        "model": model.as_dict(),
        "made": _made(settings, len(measured)),
        "budget": asdict(budget),
        "layer": {
            "answer": answer_layer(curves, budget.max_answer_kl, budget.max_token_change),
            "first-token": first_token_layer(first_kl, budget.eta),
        },
        "tasks": {
            task: {
                "samples": len(of_task),
                "tokens": sum(sample.output_tokens for sample in of_task),
                "as_expected": _as_expected(of_task),
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
        "kv_share": [kv_share(layer, num_layers, request) for layer in layers],
        "prefill_flops_share": [flops(layer) / flops(num_layers) for layer in layers],
        "prefill_flops": flops(num_layers),
    }


def _made(settings: Settings, samples: int) -> dict[str, Any]:
    names = ("vllm-vtw", "torch", "transformers")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in names},
        "samples": samples,
        **asdict(settings),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _as_expected(measured: Sequence[Measured]) -> float | None:
    known = [sample.answer == sample.expected for sample in measured if sample.expected is not None]
    return float(np.mean(known)) if known else None
