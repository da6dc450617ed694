"""What was measured so far, kept sample by sample, so that a calibration can be interrupted and resumed."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_vtw.search.divergence import Difference
from vllm_vtw.search.journal import Journal


@dataclass(frozen=True)
class CalibrationSettings:
    """What samples have to have in common to be looked at together.

    Attributes:
        checkpoint: The model's name or folder.
        revision: Of the checkpoint: `checkpoint.revision`.
        data_sha256: `data.Data.sha256`.
        seed: Of the order that samples are drawn in.
        layers: Values of K, ascending.
        max_tokens: Of an answer.
        dtype: Of the weights.
        device: Its type.
        versions: Of what computed.
    """

    checkpoint: str
    revision: str
    data_sha256: str
    seed: int
    layers: list[int]
    max_tokens: int
    dtype: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class MeasuredSample:
    """One sample's answer by the full model, and what withdrawal does to it, by position in `layers`.

    `inputs_sha256` is of what the model got: tokens and pixels.
    """

    where: str
    task: str
    inputs_sha256: str
    prompt: str
    answer: str
    expected: str | None
    visual_tokens: int
    text_tokens: int
    cut: bool
    differences: list[Difference]

    @property
    def output_tokens(self) -> int:
        return len(self.differences[0].changed)


class CalibrationJournal:
    """The measured samples of a folder.

    Args:
        folder: Made where it is missing.
        settings: Those of now.
        resume: Go on with what is there.

    Raises:
        ValueError: The folder's samples were measured otherwise, or `resume` was not asked for.
    """

    def __init__(self, folder: Path, settings: CalibrationSettings, resume: bool) -> None:
        self.file = folder / "samples.jsonl"
        self.journal = Journal(self.file, "calibration", asdict(settings), resume)
        self.measured: dict[str, MeasuredSample] = {}
        """By `MeasuredSample.where`."""
        for line in self.journal.found:
            differences = [Difference(**difference) for difference in line["differences"]]
            self.measured[line["where"]] = MeasuredSample(**(line | {"differences": differences}))

    def add(self, measured: MeasuredSample) -> None:
        self.measured[measured.where] = measured
        self.journal.add(asdict(measured))
