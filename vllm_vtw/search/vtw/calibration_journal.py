# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stores what a calibration measures, sample by sample, so that it can be interrupted and resumed."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_vtw.search.divergence import AnswerDivergence
from vllm_vtw.search.journal import Journal


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings that all measured samples of a calibration have in common.

    A calibration can be resumed only with the same settings.

    Attributes:
        checkpoint: The checkpoint's name on the Hugging Face Hub, or its folder.
        revision: The `checkpoint.revision` of the checkpoint.
        data_sha256: The SHA-256 of the data, in hexadecimal digits.
        seed: The seed of the order in which samples are drawn.
        layers: The values of K that are measured, ascending. If visual tokens leave before the decoder, the
            last one is the number of layers, at which nothing more leaves.
        keep: The share of each image's visual tokens that stays before the decoder.
        ranking: What they are ranked by there.
        max_tokens: The most tokens of an answer.
        dtype: The data type of the model's weights.
        device: The type of the device, such as "cuda".
        versions: The versions of the packages that compute, by package name.
    """

    checkpoint: str
    revision: str
    data_sha256: str
    seed: int
    layers: list[int]
    keep: float
    ranking: str
    max_tokens: int
    dtype: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class MeasuredSample:
    """The full model's answer to a sample, and how withdrawal changes it at each K.

    Attributes:
        where: The line, item or file that the sample comes from.
        task: The sample's task label.
        inputs_sha256: The SHA-256 of the model's inputs, token ids and pixels.
        prompt: The prompt as the model gets it, with its image placeholders.
        answer: The full model's answer.
        tokens: The token ids of the full model's answer.
        expected: The answer that the data gives. None if it gives none.
        visual_tokens: The number of the prompt's visual tokens.
        text_tokens: The number of the prompt's text tokens.
        cut: Whether the answer reached the most tokens allowed without an end-of-sequence token.
        differences: For each of `CalibrationSettings.layers`, how withdrawal there changes the answer.
    """

    where: str
    task: str
    inputs_sha256: str
    prompt: str
    answer: str
    tokens: list[int]
    expected: str | None
    visual_tokens: int
    text_tokens: int
    cut: bool
    differences: list[AnswerDivergence]

    @property
    def output_tokens(self) -> int:
        """The number of tokens of the answer."""
        return len(self.tokens)


class CalibrationJournal:
    """The journal of a calibration, `samples.jsonl` in its output folder.

    Args:
        folder: The output folder. It is created if it is missing.
        settings: The settings of this run.
        resume: Whether to continue with the samples that the folder holds.

    Attributes:
        measured: The measured samples, by `MeasuredSample.where`.

    Raises:
        ValueError: As `Journal` raises it, for example because the samples were measured with other settings.
    """

    def __init__(self, folder: Path, settings: CalibrationSettings, resume: bool) -> None:
        self.file = folder / "samples.jsonl"
        self.journal = Journal(self.file, "calibration", asdict(settings), resume)
        self.measured: dict[str, MeasuredSample] = {}
        for line in self.journal.found:
            differences = [AnswerDivergence(**difference) for difference in line["differences"]]
            self.measured[line["where"]] = MeasuredSample(**(line | {"differences": differences}))

    def add(self, measured: MeasuredSample) -> None:
        """Adds a sample to `measured` and to the file."""
        self.measured[measured.where] = measured
        self.journal.add(asdict(measured))
