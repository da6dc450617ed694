"""What gates would read of a prompt at each layer, and what leaving there would do to its answer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from vllm_vtw.gates import gate_features
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped
from vllm_vtw.search.journal import Journal
from vllm_vtw.search.model import FullAnswer, HFModel
from vllm_vtw.search.resume import Inputs, evaluate_samples

AGREEMENT, MOST_LOSS = 0.99, 1.03
SLACK = 0.02
"""Nats per token: *ours*. To the published 3% it is added, as a model is next to sure of its own answers."""


@dataclass(frozen=True)
class SampleExits:
    """One sample, by position in the layers that were looked at.

    Attributes:
        may_leave: Whether visual tokens may leave at each layer: `may_leave`.
        answers: What the model says without them from each layer on, and last, with them; none where only
            gates are trained.
    """

    where: str
    task: str
    inputs_sha256: str
    expected: str | None
    visual_tokens: int
    text_tokens: int
    output_tokens: int
    cut: bool
    may_leave: list[bool]
    answers: list[str]


def may_leave(full: torch.Tensor, withdrawn: torch.Tensor, tokens: Sequence[int]) -> bool:
    """DyVTE's label (arXiv 2411.19628): the answer stays, and is about as likely.

    The answer is the full model's own, *ours*: data need none.

    Args:
        full: Logits that the answer was chosen by, shape `(O, vocabulary)`.
        withdrawn: The same without visual tokens.
        tokens: The answer.
    """
    agree = (full.argmax(-1) == withdrawn.argmax(-1)).float().mean()
    target = torch.tensor(tokens, device=full.device)
    loss, of_full = cross_entropy(withdrawn, target), cross_entropy(full, target)
    return bool(agree > AGREEMENT and loss < max(MOST_LOSS * of_full, of_full + SLACK))


class ExitStore:
    """What was looked at so far: a journal, and beside it what gates read, a row for every line.

    Args:
        folder: Made where it is missing.
        settings: What all samples have in common, `layers` among it.
        hidden_size: Of the model.
        with_answers: Whether answers are kept, too.
        resume: Go on with what is there.

    Raises:
        ValueError: As `Journal` does, or rows are missing.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], hidden_size: int, with_answers: bool, resume: bool
    ) -> None:
        name = "exits-answers.jsonl" if with_answers else "exits.jsonl"
        self.with_answers = with_answers
        self.journal = Journal(folder / name, "evaluation" if with_answers else "training", settings, resume)
        self.rows = folder / "features.f32"
        self.shape = (len(settings["layers"]), 2 * hidden_size)
        self.seen = {line["where"]: SampleExits(**line) for line in self.journal.found}
        if not self.seen:
            self.rows.write_bytes(b"")
        elif not self.rows.is_file() or self.rows.stat().st_size < len(self.seen) * self._row_bytes:
            raise ValueError(f"--resume: {self.rows} is not whole: give another --out")

    @property
    def _row_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * 4

    def add(self, exits: SampleExits, read: torch.Tensor) -> None:
        """Keeps a sample, and what gates read at each layer, shape `(layers, 2 * hidden_size)`."""
        with self.rows.open("r+b") as file:
            # Behind the last line's row there may be one that got no line.
            file.seek(len(self.seen) * self._row_bytes)
            file.write(read.cpu().numpy().astype(np.float32).tobytes())
        self.seen[exits.where] = exits
        self.journal.add(asdict(exits))

    def features(self, exits: Sequence[SampleExits]) -> npt.NDArray[np.float32]:
        """What gates read of samples, shape `(samples, layers, 2 * hidden_size)`."""
        rows = {where: row for row, where in enumerate(self.seen)}
        everything = np.memmap(self.rows, dtype=np.float32, mode="r", shape=(len(rows), *self.shape))
        return everything[[rows[one.where] for one in exits]]


def collect_exits(
    model: HFModel,
    samples: Sequence[Sample],
    limit: int,
    layers: Sequence[int],
    max_tokens: int,
    store: ExitStore,
) -> Iterator[Skipped | SampleExits]:
    """Goes through samples in their order until `limit` are good. What `store` has is not computed again.

    Yields:
        Each sample that is good, and why others are not.

    Raises:
        ValueError: A sample of `store` was another one then.
    """

    def see(sample: Sample, inputs: Inputs, digest: str) -> SampleExits:
        text_start = _text_start(model, inputs)
        answered = model.answer(inputs, max_tokens)
        seen = _looked_at(model, sample, digest, answered, layers, max_tokens, store.with_answers)
        store.add(seen, _read(answered, layers, text_start))
        return seen

    yield from evaluate_samples(model, samples, limit, max_tokens, store.seen, store.journal.file, see)


def _text_start(model: HFModel, inputs: Inputs) -> int:
    """Where the text behind a prompt's last picture begins."""
    prompt = inputs["input_ids"][0]
    start = int((prompt == model.config.image_token_id).nonzero()[-1]) + 1
    if len(prompt) - start < 2:
        raise BadSampleError("gates read the text behind the last picture: here are not two tokens of it")
    return start


def _read(answered: FullAnswer, layers: Sequence[int], text_start: int) -> torch.Tensor:
    """What gates read at each layer, shape `(layers, 2 * hidden_size)`."""
    positions = answered.positions
    text = (positions >= text_start) & (positions < answered.prompt_tokens)
    return torch.stack([gate_features(answered.states[layer][text]) for layer in layers])


def _looked_at(
    model: HFModel,
    sample: Sample,
    digest: str,
    answered: FullAnswer,
    layers: Sequence[int],
    max_tokens: int,
    with_answers: bool,
) -> SampleExits:
    labels, said = [], []
    for layer, logits in zip(layers, model.withdrawn_logits(answered, layers), strict=True):
        labels.append(may_leave(answered.logits, logits, answered.tokens))
        if with_answers:
            same = logits.argmax(-1).tolist() == answered.tokens
            said.append(answered.tokens if same else model.withdrawn_answer(answered, layer, max_tokens))
    said += [answered.tokens] * with_answers
    return SampleExits(
        where=sample.where,
        task=sample.task,
        inputs_sha256=digest,
        expected=sample.answer,
        visual_tokens=answered.visual_tokens,
        text_tokens=answered.text_tokens,
        output_tokens=len(answered.tokens),
        cut=answered.cut,
        may_leave=labels,
        answers=[model.processor.tokenizer.decode(one, skip_special_tokens=True).strip() for one in said],
    )
