# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""An engine's steps, as `--enable-logging-iteration-details` logs them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LOG_LINE = re.compile(
    r"(?P<at>\d+\.\d+) .*Iteration\(\d+\): "
    r"(?P<prefills>\d+) context requests, (?P<prefilled>\d+) context tokens, "
    r"(?P<decodes>\d+) generation requests, (?P<decoded>\d+) generation tokens, "
    r"iteration elapsed time: (?P<milliseconds>[\d.]+) ms.*? KV cache usage: (?P<kv>[\d.]+)%"
)


def logging_config(folder: Path) -> Path:
    """Writes what `VLLM_LOGGING_CONFIG_PATH` takes to log with the time in fractions of a second."""
    file = folder / "logging.json"
    handler = {"class": "logging.StreamHandler", "formatter": "timed", "stream": "ext://sys.stdout"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"timed": {"format": "%(created).4f %(levelname)s %(message)s"}},
        "handlers": {"timed": handler},
        "loggers": {"vllm": {"handlers": ["timed"], "level": "INFO", "propagate": False}},
    }
    file.write_text(json.dumps(config))
    return file


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
        at: When the server was told that it had ended, in seconds.
        in_model: Seconds that the engine waited for the model. With asynchronous scheduling less than the
            model took.
        prefills: Requests that computed a part of their prompt, for the first time.
        decodes: The other requests.
        tokens: Computed.
        kv: Share of the KV blocks that are in use.
    """

    at: float
    in_model: float
    prefills: int
    decodes: int
    tokens: int
    kv: float

    @property
    def requests(self) -> int:
        return self.prefills + self.decodes

    @property
    def is_decode(self) -> bool:
        """Whether every request computed one token: one that was preempted computes all of its anew."""
        return self.prefills == 0 and self.tokens == self.decodes


def read_steps(log: str) -> list[Step]:
    """The steps of a part of a log."""
    return [
        Step(
            at=float(line["at"]),
            in_model=float(line["milliseconds"]) / 1000,
            prefills=int(line["prefills"]),
            decodes=int(line["decodes"]),
            tokens=int(line["prefilled"]) + int(line["decoded"]),
            kv=float(line["kv"]) / 100,
        )
        for line in LOG_LINE.finditer(log)
    ]


@dataclass(frozen=True)
class Steps:
    """What a run's steps come to.

    Attributes:
        count: Steps.
        seconds: That they took.
        in_model: Seconds in which the engine waited for the model.
        prefill: Seconds that decoding alone would not have taken. What is computed anew for a request that
            was preempted is among them.
        most_running: Requests in one step.
        mean_running: Requests at once, over the time in which some had not yet been let in.
        most_kv: Share of the KV blocks in use at once.
    """

    count: int
    seconds: float
    in_model: float
    prefill: float
    most_running: int
    mean_running: float
    most_kv: float

    @classmethod
    def of(cls, steps: Sequence[Step], asynchronous: bool) -> "Steps":
        """Sums up a run.

        Args:
            steps: Of the run, of which one at least computed a prompt.
            asynchronous: Whether the engine prepares a step while the model computes the one before. The time
                from step to step then stands for what a step took, but for those that found no request there.

        Raises:
            ValueError: There are no such steps.
        """
        if not any(step.prefills for step in steps):
            raise ValueError("the server's log tells of no step that computed a prompt")
        in_model = np.array([step.in_model for step in steps])
        ends = np.array([step.at for step in steps])
        seconds = in_model
        if asynchronous:
            idle_before = np.array([True, *(step.kv == 0 for step in steps[:-1])])
            seconds = np.where(idle_before, in_model, np.diff(ends, prepend=0))
        requests = np.array([step.requests for step in steps])
        full = 1 + max(index for index, step in enumerate(steps) if step.prefills)
        return cls(
            count=len(steps),
            seconds=float(seconds.sum()),
            in_model=float(in_model.sum()),
            prefill=_prefill_seconds(steps, seconds),
            most_running=int(requests.max()),
            mean_running=float(np.average(requests[:full], weights=seconds[:full])),
            most_kv=max(step.kv for step in steps),
        )


def _prefill_seconds(steps: Sequence[Step], seconds: np.ndarray) -> float:
    """Of the steps that did more than decode, what is above a line through those that did nothing else."""
    requests = np.array([step.decodes for step in steps])
    decoded = np.array([step.is_decode for step in steps])
    if len(set(requests[decoded])) > 1:
        slope, start = np.polyfit(requests[decoded], seconds[decoded], 1)
        to_decode = start + slope * requests
    else:
        to_decode = np.full(len(steps), np.median(seconds[decoded]) if decoded.any() else 0.0)
    return float((seconds - np.where(requests > 0, to_decode, 0))[~decoded].clip(0).sum())
