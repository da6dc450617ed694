# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Collects what gates learn from: their features of a prompt, and whether its visual tokens may leave."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from vllm_vtw.gates import gate_features
from vllm_vtw.search.data.prompts import ModelInputs
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped
from vllm_vtw.search.journal import Journal
from vllm_vtw.search.model import FullAnswer, HFModel
from vllm_vtw.search.resume import evaluate_samples

AGREEMENT, MOST_LOSS = 0.99, 1.03
"""As published: the share of answer tokens that have to stay the same, and the largest ratio of losses."""
SLACK = 0.02
"""Unlike the paper, this project also allows a loss that exceeds the full model's by so many nats per token.
A model is almost certain of its own answers, so 3% of its loss on them is next to nothing."""


@dataclass(frozen=True)
class SampleExits:
    """What an exit at each candidate layer does to a sample.

    Attributes:
        where: The line, item or file that the sample comes from.
        task: The sample's task label.
        inputs_sha256: The SHA-256 of the model's inputs, token ids and pixels.
        expected: The answer that the data gives. None if it gives none.
        visual_tokens: The number of the prompt's visual tokens.
        text_tokens: The number of the prompt's text tokens.
        output_tokens: The number of tokens of the full model's answer.
        cut: Whether that answer reached the most tokens allowed without an end-of-sequence token.
        may_leave: For each layer, whether visual tokens may leave there, as the function `may_leave` decides.
        answers: For each layer, the model's answer if visual tokens leave there, and after these the full
            model's answer. Empty if the samples are for training.
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
    """Whether visual tokens may leave, which is the label that DyVTE's gates learn (arXiv 2411.19628).

    They may if almost all tokens of the answer stay the same, and the answer is about as likely as before.
    Unlike the paper, this project uses the full model's own answer, so the data needs no answers.

    Args:
        full: The logits from which the O tokens of the answer were chosen, shape `(O, vocabulary)`.
        withdrawn: The logits for the same answer without visual tokens, shape `(O, vocabulary)`.
        tokens: The answer's token ids.
    """
    agree = (full.argmax(-1) == withdrawn.argmax(-1)).float().mean()
    target = torch.tensor(tokens, device=full.device)
    loss, of_full = cross_entropy(withdrawn, target), cross_entropy(full, target)
    return bool(agree > AGREEMENT and loss < max(MOST_LOSS * of_full, of_full + SLACK))


class ExitStore:
    """Stores the exits of samples in a journal, and the gates' features in a binary file beside it.

    The file `features.f32` has a row of features for each sample, in the order of the journal.

    Args:
        folder: The output folder. It is created if it is missing.
        settings: The settings that all samples have in common. `layers` lists the candidate layers.
        hidden_size: The model's hidden size.
        with_answers: Whether the answers for each exit are stored. They are needed for an evaluation, not for
            training.
        resume: Whether to continue with the samples that the folder holds.

    Attributes:
        seen: The samples so far, by `SampleExits.where`.

    Raises:
        ValueError: As `Journal` raises it, or the file of features is missing or too short.
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
            raise ValueError(
                f"--resume: {self.rows} is missing or too short for the {len(self.seen)} samples of "
                f"{self.journal.file}: give another --out"
            )

    @property
    def _row_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * 4

    def add(self, exits: SampleExits, features: torch.Tensor) -> None:
        """Stores a sample.

        Args:
            exits: The sample.
            features: The features that a gate reads at each layer, shape `(layers, 2 * hidden_size)`.
        """
        with self.rows.open("r+b") as file:
            # A search that was interrupted may have written a row without its line. That row is overwritten.
            file.seek(len(self.seen) * self._row_bytes)
            file.write(features.cpu().numpy().astype(np.float32).tobytes())
        self.seen[exits.where] = exits
        self.journal.add(asdict(exits))

    def features(self, exits: Sequence[SampleExits]) -> npt.NDArray[np.float32]:
        """The features that gates read of samples, shape `(samples, layers, 2 * hidden_size)`."""
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
    """Collects the exits of samples in their order until there are `limit`.

    Args:
        model: The model.
        samples: The samples, in the order in which they are tried.
        limit: The number of samples that are wanted.
        layers: The candidate layers, ascending.
        max_tokens: The most tokens of an answer.
        store: Stores the samples. Those that it already has are not computed again.

    Yields:
        For each sample its exits or, if the sample cannot be used, the reason.

    Raises:
        ValueError: There is no chat template, the model's logits are not finite, or a sample of `store` had
            another image or prompt when it was stored.
    """

    def evaluate(sample: Sample, inputs: ModelInputs, digest: str) -> SampleExits:
        text_start = _text_start(inputs)
        answered = model.answer(inputs, max_tokens)
        exits = _sample_exits(model, sample, digest, answered, layers, max_tokens, store.with_answers)
        store.add(exits, _features(answered, layers, text_start))
        return exits

    yield from evaluate_samples(model, samples, limit, max_tokens, store.seen, store.journal.file, evaluate)


def _text_start(inputs: ModelInputs) -> int:
    """The position at which the text after a prompt's last image begins.

    Raises:
        BadSampleError: There are fewer than two tokens of text, which is too few for a gate.
    """
    start = int(inputs.is_visual.nonzero()[-1]) + 1
    if len(inputs.is_visual) - start < 2:
        raise BadSampleError(
            "gates read the text after the last image and need at least two tokens of it: put text there"
        )
    return start


def _features(answered: FullAnswer, layers: Sequence[int], text_start: int) -> torch.Tensor:
    """The features that a gate reads at each layer, shape `(layers, 2 * hidden_size)`."""
    places = answered.text_places
    text = (places >= text_start) & (places < answered.prompt_tokens)
    return torch.stack([gate_features(answered.states[layer][text]) for layer in layers])


def _sample_exits(
    model: HFModel,
    sample: Sample,
    digest: str,
    answered: FullAnswer,
    layers: Sequence[int],
    max_tokens: int,
    with_answers: bool,
) -> SampleExits:
    labels, answers = [], []
    for layer, logits in zip(layers, model.withdrawn_logits(answered, layers), strict=True):
        labels.append(may_leave(answered.logits, logits, answered.tokens))
        if with_answers:
            same = logits.argmax(-1).tolist() == answered.tokens
            answers.append(answered.tokens if same else model.withdrawn_answer(answered, layer, max_tokens))
    if with_answers:
        answers.append(answered.tokens)
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
        answers=[model.processor.tokenizer.decode(one, skip_special_tokens=True).strip() for one in answers],
    )
