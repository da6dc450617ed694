"""What was measured so far, kept sample by sample, so that a calibration can be interrupted and resumed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_vtw.search.criteria import Difference

FORMAT = "vllm-vtw-calibration/1"
LONG = 60


@dataclass(frozen=True)
class Settings:
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
class Measured:
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


class Progress:
    """The measured samples of a folder: a file of JSON lines, the settings first.

    Args:
        folder: Made where it is missing.
        settings: Those of now.
        resume: Go on with what is there.

    Raises:
        ValueError: The folder's samples were measured otherwise, or `resume` was not asked for.
    """

    def __init__(self, folder: Path, settings: Settings, resume: bool) -> None:
        self.file = folder / "samples.jsonl"
        self.measured: dict[str, Measured] = {}
        """By `Measured.where`."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if len(lines) < 2:
            self.file.write_text(json.dumps({"format": FORMAT} | asdict(settings)) + "\n", encoding="utf-8")
        elif not resume:
            raise ValueError(f"{folder} holds a calibration: go on with --resume, or give another --out")
        else:
            self._take(lines, settings)

    def add(self, measured: Measured) -> None:
        self.measured[measured.where] = measured
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measured), allow_nan=False) + "\n")

    def _read(self) -> list[Any]:
        """What the file's whole lines say; none where there is no file."""
        if not self.file.exists():
            return []
        content = self.file.read_text(encoding="utf-8")
        whole = content[: content.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            ours = lines[0]["format"] == FORMAT
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.file} cannot be read as a calibration: give another --out") from error
        if not ours:
            raise ValueError(f"{self.file} is not of this version's calibration: give another --out")
        if whole != content:  # the process was killed while it wrote
            self.file.write_text(whole, encoding="utf-8")
        return lines

    def _take(self, lines: list[Any], settings: Settings) -> None:
        head, *rest = lines
        for name, now in asdict(settings).items():
            if head.get(name) != now:
                short = max(len(str(now)), len(str(head.get(name)))) < LONG
                values = f", {head.get(name)}, and now it is {now}" if short else ""
                raise ValueError(
                    f"--resume: {self.file} was made with another {name}{values}: give the same as then, or "
                    "another --out"
                )
        for line in rest:
            differences = [Difference(**difference) for difference in line.pop("differences")]
            self.measured[line["where"]] = Measured(**line, differences=differences)
