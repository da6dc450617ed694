"""What is withdrawn and from which layer on: pure data, and the policy file that carries it."""

import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from vllm_vtw.files import read_file, shorten

MAX_POLICY_BYTES = 16 << 20
"""Of a policy file, which takes less than a hundredth of that with the curves of a calibration."""
FORMAT = "vllm-vtw-policy/1"
RANKING = "last-token-attention"
MODEL_KEYS = ("model_type", "num_hidden_layers", "hidden_size")


@dataclass(frozen=True)
class Stage:
    """Layers from `layer` on hold the fraction `keep` of a request's visual tokens."""

    layer: int
    keep: float

    def kept(self, visual_tokens: int) -> int:
        """How many of a request's visual tokens stay: those that are ranked highest."""
        return ceil(Fraction(str(self.keep)) * visual_tokens)  # 0.1 of 30 is 3, but not in floating point


@dataclass(frozen=True)
class Gate:
    """Gates before every stage past the first, which decide in a prompt when its visual tokens leave.

    DyVTE (arXiv 2411.19628). What has not left by the last border stays.

    Attributes:
        weights: A safetensors file, in a policy file from its folder on.
        sha256: Of that file.
        thresholds: By stage: visual tokens leave where the second logit is above the first by more.
            Published: 0.
    """

    weights: str
    sha256: str
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Policy:
    """The stages past the first, from shallow to deep. Stage 0 holds every token and is not listed."""

    stages: tuple[Stage, ...]
    gate: Gate | None = None

    @classmethod
    def withdraw_at(cls, layer: int, num_hidden_layers: int) -> "Policy":
        """VTW (arXiv 2405.05803): no visual tokens from `layer` on. `num_hidden_layers` withdraws nothing."""
        return cls((Stage(layer, 0.0),) if layer < num_hidden_layers else ())

    @classmethod
    def read(cls, file: Path, model: dict[str, Any]) -> "Policy":
        """Reads a policy file, with the path of its gates where it has some.

        Args:
            file: The policy file. Its gates lie beside it.
            model: `MODEL_KEYS` of the model that is being served.

        Raises:
            ValueError: The file cannot be read, or `from_file` refuses it. The message is one short line.
        """
        policy = cls.from_file(read_json(file), model)
        if policy.gate is None:
            return policy
        weights = policy.gate.weights
        if weights in (".", "..") or not re.fullmatch(r"[^/\\\x00-\x1f]+", weights):
            raise ValueError(
                f"'gate'['weights'] = {shorten(weights)}: has to be the name of a file beside it"
            )
        return replace(policy, gate=replace(policy.gate, weights=str(file.absolute().parent / weights)))

    @classmethod
    def from_file(cls, content: Any, model: dict[str, Any]) -> "Policy":
        """Reads a policy file's JSON.

        Args:
            content: The parsed file.
            model: `MODEL_KEYS` of the model that is being served.

        Raises:
            ValueError: The file is of another format, was made for another model, or asks for what this
                version cannot serve.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not a policy file: expected a JSON object with 'format': '{FORMAT}'")
        made_for = content.get("model")
        if made_for != model:
            raise ValueError(f"made for another model: {shorten(made_for)}; this one is {model}")
        stages = content.get("stages")
        if not isinstance(stages, list):
            raise ValueError("'stages' has to be a list")
        policy = cls(cls._checked(stages, model["num_hidden_layers"]))
        if content.get("gate") is not None:
            policy = replace(policy, gate=policy._checked_gate(content["gate"]))
        ranking = content.get("ranking")
        if ranking != policy.ranking:
            found = f"'ranking' = {shorten(ranking)}: has to be {policy.ranking!r}"
            raise ValueError(f"{found}, as {'a' if policy.ranking else 'no'} stage keeps some visual tokens")
        return policy

    @staticmethod
    def _checked(stages: list[Any], num_hidden_layers: int) -> tuple[Stage, ...]:
        checked: list[Stage] = []
        for number, stage in enumerate(stages):
            where = f"'stages'[{number}]"
            if not isinstance(stage, dict) or set(stage) != {"layer", "keep"}:
                raise ValueError(
                    f"{where} has to have exactly the keys 'layer' and 'keep', got {shorten(stage)}"
                )
            layer, keep = stage["layer"], stage["keep"]
            least = checked[-1].layer + 1 if checked else 1
            if type(layer) is not int or not least <= layer < num_hidden_layers:
                most = num_hidden_layers - 1
                raise ValueError(
                    f"{where}['layer'] = {shorten(layer)}: has to be an integer from {least} to {most}"
                )
            if type(keep) not in (int, float) or not 0 <= keep < 1:
                raise ValueError(
                    f"{where}['keep'] = {shorten(keep)}: has to be a number from 0 on, less than 1"
                )
            if checked and keep > checked[-1].keep:
                raise ValueError(
                    f"{where}['keep'] = {shorten(keep)}: more than before, where tokens left for good"
                )
            checked.append(Stage(layer, float(keep)))
        return tuple(checked)

    def _checked_gate(self, gate: Any) -> Gate:
        if not isinstance(gate, dict) or set(gate) != {"weights", "sha256", "thresholds"}:
            raise ValueError("'gate' has to have exactly the keys 'weights', 'sha256' and 'thresholds'")
        if not self.stages or any(stage.keep for stage in self.stages):
            raise ValueError("'stages' of a 'gate' are where it may let all visual tokens leave: 'keep' is 0")
        for key in ("weights", "sha256"):
            if not isinstance(gate[key], str):
                raise ValueError(f"'gate'['{key}'] = {shorten(gate[key])}: has to be a string")
        thresholds = gate["thresholds"]
        if (
            not isinstance(thresholds, list)
            or len(thresholds) != len(self.stages)
            or not all(map(_is_finite, thresholds))
        ):
            raise ValueError(
                f"'gate'['thresholds'] = {shorten(thresholds)}: has to be a number for every stage, "
                f"{len(self.stages)}"
            )
        return Gate(gate["weights"], gate["sha256"], tuple(map(float, thresholds)))

    def to_file(self, model: dict[str, Any]) -> dict[str, Any]:
        """The policy as the JSON object of a policy file."""
        stages = [{"layer": stage.layer, "keep": stage.keep} for stage in self.stages]
        return {
            "format": FORMAT,
            "model": model,
            "stages": stages,
            "ranking": self.ranking,
            "gate": self.gate and asdict(self.gate) | {"thresholds": list(self.gate.thresholds)},
        }

    @property
    def ranking(self) -> str | None:
        """What visual tokens are ranked by; None where no stage keeps some of them and not others."""
        return RANKING if any(stage.keep > 0 for stage in self.stages) else None

    @property
    def is_dynamic(self) -> bool:
        """Whether what is withdrawn is known only when a prompt is computed, from its first picture on."""
        return self.ranking is not None or self.gate is not None

    @property
    def keeps(self) -> tuple[float, ...]:
        """The fraction of visual tokens that every stage holds at least, stage 0 included."""
        return (1.0, *(stage.keep for stage in self.stages))

    def segments(self, num_hidden_layers: int) -> list[range]:
        """The decoder layers of every stage, stage 0 included."""
        borders = [0, *(stage.layer for stage in self.stages), num_hidden_layers]
        return [range(start, stop) for start, stop in pairwise(borders)]


def read_json(file: Path) -> Any:
    """What a policy file says, of which nothing is checked.

    Raises:
        ValueError: The file cannot be read, or is no JSON. The message is one short line.
    """
    try:
        return json.loads(read_file(file, MAX_POLICY_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON: {error}") from error


def _is_finite(value: Any) -> bool:
    # `math.isfinite` would convert an integer, and fail for one that is larger than any float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
