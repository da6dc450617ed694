# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads an engine's steps from its log, where `--enable-logging-iteration-details` writes them."""

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
    """Writes a file for `VLLM_LOGGING_CONFIG_PATH` that makes vLLM log times with fractions of a second."""
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
        at: The time when the step was logged, which is after its end, in seconds.
        in_model: How long the engine waited for the model, in seconds. With asynchronous scheduling, this is
            less than the model took.
        prefills: The number of requests that computed a part of their prompt for the first time.
        decodes: The number of other requests.
        tokens: The number of tokens that were computed.
        kv: The fraction of the KV blocks that are in use.
    """

    at: float
    in_model: float
    prefills: int
    decodes: int
    tokens: int
    kv: float

    @property
    def requests(self) -> int:
        """The number of requests in the step."""
        return self.prefills + self.decodes

    @property
    def is_decode(self) -> bool:
        """Whether every request computed one token.

        A request that is resumed after a preemption computes all of its tokens again.
        """
        return self.prefills == 0 and self.tokens == self.decodes


def read_steps(log: str) -> list[Step]:
    """The steps that a part of a log reports."""
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
    """A summary of a run's steps.

    Attributes:
        count: The number of steps.
        seconds: How long all steps took together.
        in_model: How long the engine waited for the model, in seconds.
        prefill: How much longer the steps took than decoding would have, in seconds. It includes what was
            computed again for requests that were preempted.
        most_running: The largest number of requests in a step.
        mean_running: The mean number of requests in a step, weighted by the step's time, up to the last step
            that computed a prompt.
        most_kv: The largest fraction of the KV blocks that was in use.
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
        """Summarises a run.

        Args:
            steps: The steps of the run. At least one has to compute a prompt.
            asynchronous: Whether the engine prepares a step while the model computes the one before. The time
                of a step is then that since the end of the step before. If the step before left no requests,
                it is `in_model`, as for all steps without asynchronous scheduling.

        Raises:
            ValueError: No step computed a prompt.
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
    """How much longer the steps with prompts took than decoding would have, in seconds.

    The time that decoding takes is a line over the number of requests, fitted to the steps that only decoded.
    """
    requests = np.array([step.decodes for step in steps])
    decoded = np.array([step.is_decode for step in steps])
    if len(set(requests[decoded])) > 1:
        slope, start = np.polyfit(requests[decoded], seconds[decoded], 1)
        to_decode = start + slope * requests
    else:
        to_decode = np.full(len(steps), np.median(seconds[decoded]) if decoded.any() else 0.0)
    return float((seconds - np.where(requests > 0, to_decode, 0))[~decoded].clip(0).sum())
