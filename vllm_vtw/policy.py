# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is withdrawn and from which layer on, as pure data, and the policy file that stores it."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from vllm_vtw.untrusted_files import read_file, shorten

MAX_POLICY_BYTES = 16 << 20
"""The size of the largest policy file that is read. With the curves of a calibration, a file takes less than
a hundredth of that."""
FORMAT = "vllm-vtw-policy/1"
BY_ATTENTION = ("last-token-attention", "key-norm")
"""The rankings of visual tokens that read queries and keys of a prompt in one layer."""
BY_STATE = ("variation",)
"""The rankings that read the states of a prompt before and after one layer."""
BY_QUESTION = BY_ATTENTION + BY_STATE
"""The rankings that read what a decoder has computed of the prompt."""
BY_FEATURES = ("diversity",)
"""The rankings that read what the encoder has computed of an image."""
BY_IMAGE = ("uniform", "random", *BY_FEATURES)
"""The rankings that go by an image alone. They are the same for every question about it."""
MODEL_KEYS = ("model_type", "num_hidden_layers", "hidden_size")
"""The keys of a policy file's `model` object, which says what model the policy was made for."""

POLICY_KEYS = (
    *("format", "model", "stages", "ranking", "keeps", "gate", "layer", "tasks"),
    *("calibration", "search", "training"),
)
"""The keys of a policy file. The last three record how the policy was made."""
MAX_TASK_NAME = 64
"""The length of the longest name of a task. Metrics have a label with it."""


@dataclass(frozen=True)
class Stage:
    """A stage past the first.

    Attributes:
        layer: The stage's first decoder layer.
        keep: The fraction of a request's visual tokens that the stage holds, from 0 (none) to less than 1, or
            1 (all) if a request chose that. It counts all of the request's visual tokens, not those of the
            stage before. Under a ranking by image alone, it is the fraction of each image's.
    """

    layer: int
    keep: float

    def kept(self, visual_tokens: int) -> int:
        """How many of these visual tokens the stage holds. Those that are ranked highest stay."""
        # In floating point, 0.07 of 100 tokens would be 7.000000000000001, which is rounded up to 8.
        return ceil(Fraction(str(self.keep)) * visual_tokens)


@dataclass(frozen=True)
class Gate:
    """The gates of a policy, one before each stage past the first (DyVTE, arXiv 2411.19628).

    The gates decide for each prompt before which stage all of its visual tokens leave. If no gate lets them
    leave, they stay.

    Attributes:
        weights: Path of the safetensors file that holds the gates. In a policy file, the name of a file in
            the policy file's folder.
        sha256: SHA-256 of that file, in hexadecimal digits.
        thresholds: One for each stage past the first. The visual tokens leave before a stage if its gate's
            second logit ("leave") exceeds the first by more than the threshold. The published method uses 0.
    """

    weights: str
    sha256: str
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Policy:
    """What is withdrawn from a decoder.

    Attributes:
        stages: The stages past the first, from shallow to deep. Stage 0 holds all tokens and is not listed.
        gate: The gates that decide where visual tokens leave. None for a policy without gates.
        layer: The layer at which the visual tokens of requests leave that do not choose one. None for the
            deepest stage's layer, and under a policy that ranks visual tokens or has gates.
        tasks: By the name of a task, the layer at which the visual tokens of its requests leave.
        ranked_by: What visual tokens are ranked by where a stage keeps only some of them.
        offered_keeps: What requests may choose for the `keep` of the only stage that keeps some visual
            tokens, ascending. Empty if there is nothing to choose.
    """

    stages: tuple[Stage, ...]
    gate: Gate | None = None
    layer: int | None = None
    tasks: Mapping[str, int] = field(default_factory=dict, hash=False)
    ranked_by: str = BY_QUESTION[0]
    offered_keeps: tuple[float, ...] = ()

    @classmethod
    def withdraw_at(cls, layer: int, num_hidden_layers: int) -> "Policy":
        """The policy that withdraws all visual tokens at one layer (VTW, arXiv 2405.05803).

        Args:
            layer: The first layer that runs without visual tokens. If it is `num_hidden_layers`, nothing is
                withdrawn.
            num_hidden_layers: The number of decoder layers.
        """
        return cls((Stage(layer, 0.0),) if layer < num_hidden_layers else ())

    @classmethod
    def read(cls, file: Path, model: dict[str, Any]) -> "Policy":
        """Reads and checks a policy file.

        If the policy has gates, `gate.weights` of the result is the absolute path of the gates file.

        Args:
            file: The policy file. A gates file is in the same folder.
            model: The `model` object that the policy file has to have: `MODEL_KEYS` of the served model.

        Raises:
            ValueError: The file cannot be read, or `from_json` refuses it. The message is one short line.
        """
        policy = cls.from_json(read_json(file), model)
        if policy.gate is None:
            return policy
        weights = policy.gate.weights
        if weights in (".", "..") or not re.fullmatch(r"[^/\\\x00-\x1f]+", weights):
            raise ValueError(
                f"'gate'['weights'] = {shorten(weights)}: has to be the name of a file in the policy "
                "file's folder"
            )
        return replace(policy, gate=replace(policy.gate, weights=str(file.absolute().parent / weights)))

    @classmethod
    def from_json(cls, content: Any, model: dict[str, Any]) -> "Policy":
        """Checks the JSON value of a policy file and makes the policy of it.

        Args:
            content: The parsed JSON of the file.
            model: The `model` object that the file has to have: `MODEL_KEYS` of the served model.

        Raises:
            ValueError: The file has another format, was made for another model, or holds a value that is not
                allowed. The message is one short line.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not a policy file: expected a JSON object with 'format': '{FORMAT}'")
        unknown = [key for key in content if key not in POLICY_KEYS]
        if unknown:
            raise ValueError(f"{shorten(unknown[0])}: unknown key; allowed are {', '.join(POLICY_KEYS)}")
        made_for = content.get("model")
        if made_for != model:
            raise ValueError(f"made for another model: {shorten(made_for)}; this one is {model}")
        stages = content.get("stages")
        if not isinstance(stages, list):
            raise ValueError(
                f"'stages' = {shorten(stages)}: has to be a list of objects with the keys 'layer' and 'keep'"
            )
        ranking = content.get("ranking")
        # Before the decoder, nothing has been computed of the question.
        first_layer = 0 if ranking in BY_IMAGE else 1
        policy = cls(cls._checked_stages(stages, range(first_layer, model["num_hidden_layers"])))
        if content.get("gate") is not None:
            policy = replace(policy, gate=policy._checked_gate(content["gate"]))
        if policy.ranking is None:
            if ranking is not None:
                found = f"'ranking' = {shorten(ranking)}: has to be None"
                raise ValueError(f"{found}, as no stage has a 'keep' above 0")
        elif ranking in BY_QUESTION + BY_IMAGE:
            policy = replace(policy, ranked_by=ranking)
        else:
            allowed = ", ".join(map(repr, BY_QUESTION + BY_IMAGE))
            found = f"'ranking' = {shorten(ranking)}: has to be one of {allowed}"
            raise ValueError(f"{found}, as a stage has a 'keep' above 0")
        policy = replace(policy, offered_keeps=policy._checked_keeps(content.get("keeps")))
        offered = policy.offered_layers(model["num_hidden_layers"])
        return replace(
            policy,
            layer=policy._checked_default(content.get("layer"), offered),
            tasks=_checked_tasks(content.get("tasks"), offered),
        )

    def _checked_default(self, layer: Any, offered: list[int]) -> int | None:
        if layer is None:
            return None
        if not self.withdraws_all:
            raise ValueError(
                f"'layer' = {shorten(layer)}: has to be left out of a policy that ranks visual tokens or has "
                "gates"
            )
        if type(layer) is not int or layer not in offered:
            raise ValueError(f"'layer' = {shorten(layer)}: has to be one of {one_of(offered)}")
        return layer

    def _checked_keeps(self, keeps: Any) -> tuple[float, ...]:
        if keeps is None:
            return ()
        ranked = [stage.keep for stage in self.stages if stage.keep]
        if len(ranked) != 1:
            raise ValueError(
                f"'keeps' = {shorten(keeps)}: has to be left out, unless exactly one stage keeps some visual "
                "tokens"
            )
        if not isinstance(keeps, list) or not all(
            type(keep) in (int, float) and 0 < keep < 1 for keep in keeps
        ):
            raise ValueError(
                f"'keeps' = {shorten(keeps)}: has to be a list of numbers above 0 and less than 1, among "
                "which requests may choose"
            )
        return tuple(sorted({*ranked, *map(float, keeps)}))

    @staticmethod
    def _checked_stages(stages: list[Any], layers: range) -> tuple[Stage, ...]:
        checked: list[Stage] = []
        for number, stage in enumerate(stages):
            where = f"'stages'[{number}]"
            if not isinstance(stage, dict) or set(stage) != {"layer", "keep"}:
                raise ValueError(
                    f"{where} has to have exactly the keys 'layer' and 'keep', got {shorten(stage)}"
                )
            layer, keep = stage["layer"], stage["keep"]
            least = checked[-1].layer + 1 if checked else layers.start
            if type(layer) is not int or not least <= layer < layers.stop:
                after = ", deeper than the stage before" if checked else ""
                if layer == 0 and not checked:
                    after = f", or 0 under {' or '.join(map(repr, BY_IMAGE))}, which go by the image alone"
                raise ValueError(
                    f"{where}['layer'] = {shorten(layer)}: has to be an integer from {least} to "
                    f"{layers.stop - 1}{after}"
                )
            if type(keep) not in (int, float) or not 0 <= keep < 1:
                raise ValueError(
                    f"{where}['keep'] = {shorten(keep)}: has to be a number of at least 0 and less than 1"
                )
            if checked and keep > checked[-1].keep:
                raise ValueError(
                    f"{where}['keep'] = {shorten(keep)}: has to be at most {checked[-1].keep}, the 'keep' of "
                    "the stage before, as withdrawn tokens do not come back"
                )
            checked.append(Stage(layer, float(keep)))
        return tuple(checked)

    def _checked_gate(self, gate: Any) -> Gate:
        if not isinstance(gate, dict) or set(gate) != {"weights", "sha256", "thresholds"}:
            raise ValueError(
                "'gate' has to have exactly the keys 'weights', 'sha256' and 'thresholds', "
                f"got {shorten(gate)}"
            )
        if not self.stages or any(stage.keep for stage in self.stages):
            raise ValueError(
                "a policy with a 'gate' has to have at least one stage in 'stages', and 'keep' has to be 0 "
                "in all of them"
            )
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
                f"'gate'['thresholds'] = {shorten(thresholds)}: has to be a list of finite numbers, one for "
                f"each of the {len(self.stages)} stages"
            )
        return Gate(gate["weights"], gate["sha256"], tuple(map(float, thresholds)))

    def to_json(self, model: dict[str, Any]) -> dict[str, Any]:
        """The policy as the JSON object of a policy file.

        Args:
            model: The file's `model` object: `MODEL_KEYS` of the model that the policy was made for.
        """
        stages = [{"layer": stage.layer, "keep": stage.keep} for stage in self.stages]
        return {
            "format": FORMAT,
            "model": model,
            "stages": stages,
            "ranking": self.ranking,
            **({"keeps": list(self.offered_keeps)} if self.offered_keeps else {}),
            "gate": self.gate and asdict(self.gate) | {"thresholds": list(self.gate.thresholds)},
            **({} if self.layer is None else {"layer": self.layer}),
            **({"tasks": dict(self.tasks)} if self.tasks else {}),
        }

    @property
    def ranking(self) -> str | None:
        """What visual tokens are ranked by. None if no stage keeps only some of them."""
        return self.ranked_by if any(stage.keep > 0 for stage in self.stages) else None

    @property
    def is_dynamic(self) -> bool:
        """Whether what is withdrawn depends on states that are known only when the prompt is computed."""
        return self.ranking in BY_QUESTION or self.gate is not None

    @property
    def withdraws_all(self) -> bool:
        """Whether all visual tokens of a request leave at one layer, which is known when it arrives."""
        return self.ranking is None and self.gate is None

    @property
    def default_layer(self) -> int | None:
        """The layer at which the visual tokens of requests leave that do not choose one.

        None if nothing is withdrawn, and under a policy that ranks visual tokens or has gates.
        """
        if not self.withdraws_all or not self.stages:
            return None
        return self.stages[-1].layer if self.layer is None else self.layer

    @property
    def has_exits(self) -> bool:
        """Whether the layer at which all visual tokens leave may be another one for each request."""
        return self.gate is not None or (self.ranking is None and len(self.stages) > 1)

    def offered_layers(self, num_hidden_layers: int) -> list[int]:
        """The layers that a request may choose for its visual tokens to leave.

        The last one is the number of layers, with which they stay. A policy that ranks visual tokens offers
        nothing else.

        Args:
            num_hidden_layers: The number of decoder layers.
        """
        layers = [] if self.ranking else [stage.layer for stage in self.stages]
        return [*layers, num_hidden_layers]

    def exit_stage(self, layer: int) -> int | None:
        """The first stage without the visual tokens of a request, if they leave at a layer.

        Args:
            layer: One of `offered_layers`.

        Returns:
            1 or more. None if the visual tokens stay.
        """
        return next((number for number, stage in enumerate(self.stages, 1) if stage.layer >= layer), None)

    def keeping(self, keep: float) -> "Policy":
        """The policy of a request that chose a share of visual tokens to stay.

        Args:
            keep: One of `offered_keeps`, or 1 to keep all where others keep some.
        """
        stages = tuple(replace(stage, keep=keep) if stage.keep else stage for stage in self.stages)
        return replace(self, stages=stages)

    def most_kept(self, visual_tokens: int) -> int:
        """How many of these visual tokens stay at most where some leave, whatever a request chooses."""
        most = max([0.0, *(stage.keep for stage in self.stages), *self.offered_keeps])
        return Stage(0, most).kept(visual_tokens)

    @property
    def keeps(self) -> tuple[float, ...]:
        """The fraction of visual tokens that each stage holds at least, starting with stage 0.

        A stage of a policy with exits may hold all visual tokens, and counts as 0 here.
        """
        return (1.0, *(stage.keep for stage in self.stages))

    def segments(self, num_hidden_layers: int) -> list[range]:
        """The decoder layers of each stage, starting with stage 0."""
        borders = [0, *(stage.layer for stage in self.stages), num_hidden_layers]
        return [range(start, stop) for start, stop in pairwise(borders)]


def read_json(file: Path) -> Any:
    """The JSON value of a policy file. What it contains is not checked.

    Raises:
        ValueError: The file cannot be read, or is not JSON. The message is one short line.
    """
    try:
        return json.loads(read_file(file, MAX_POLICY_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON: {error}") from error


def one_of(layers: Sequence[int]) -> str:
    """The layers that a policy offers, as messages name them. The last one is the number of layers."""
    return f"{', '.join(map(str, layers))} (nothing is withdrawn)"


def check_task_name(name: str) -> None:
    """Checks the name of a task.

    Raises:
        ValueError: It is empty or too long, or has characters that cannot be printed.
    """
    if not 1 <= len(name) <= MAX_TASK_NAME or not name.isprintable():
        raise ValueError(
            f"task {shorten(name)}: a name has to have from 1 to {MAX_TASK_NAME} characters, and none that "
            "cannot be printed"
        )


def _checked_tasks(tasks: Any, offered: list[int]) -> dict[str, int]:
    if tasks is None:
        return {}
    if not isinstance(tasks, dict):
        raise ValueError(f"'tasks' = {shorten(tasks)}: has to be an object with a layer for each task")
    for name, layer in tasks.items():
        check_task_name(name)
        if type(layer) is not int or layer not in offered:
            raise ValueError(
                f"'tasks'[{shorten(name)}] = {shorten(layer)}: has to be one of {one_of(offered)}"
            )
    return tasks


def _is_finite(value: Any) -> bool:
    # `math.isfinite` converts integers to float and fails for those that are too large for it.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
