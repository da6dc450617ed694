# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What is measured: the points of a setup, at which one thing is varied at a time."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.serving.compare import label, named
from benchmarks.serving.models import Model
from benchmarks.serving.workload import Workload
from vllm_vtw.policy import BY_QUESTION, Policy


@dataclass(frozen=True)
class Engine:
    """The options in which the servers of a setup differ.

    Args:
        kv_mib: The KV memory in MiB. None for what vLLM takes by default, which may differ with the plugin.
        prefix_caching: Whether prefix caching is on.
    """

    kv_mib: int | None
    prefix_caching: bool = False

    def options(self) -> list[str]:
        """The options of `vllm serve`."""
        memory = [] if self.kv_mib is None else [f"--kv-cache-memory-bytes={self.kv_mib << 20}"]
        return [*memory, f"--{'' if self.prefix_caching else 'no-'}enable-prefix-caching"]


@dataclass(frozen=True)
class Point:
    """One workload on one engine, for stock vLLM and for the plugin with each policy.

    Attributes:
        sweep: What is varied, such as `"output tokens"`.
        value: The value that it has, such as `"64"`.
        workload: The requests.
        engine: The options of the servers.
        policies: The plugin's policies.
    """

    sweep: str
    value: str
    workload: Workload
    engine: Engine
    policies: tuple[Policy, ...]

    @property
    def label(self) -> str:
        """The names of the point's rows in the tables."""
        return ", ".join(dict.fromkeys(label(self.sweep, self.value, policy) for policy in self.policies))


def told(measured: Point | Policy) -> dict[str, Any]:
    """A point or policy as results contain it. Policies have stages, and a ranking if it is not FastV's."""

    def only_stages(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if "stages" not in found:
            return found
        written = {key: found.pop(key) for key in ("stages", "ranked_by")}
        assert not any(found.values())
        if written["ranked_by"] == BY_QUESTION[0]:
            del written["ranked_by"]
        return written

    return asdict(measured, dict_factory=only_stages)


@dataclass(frozen=True)
class Setup:
    """What one call of the benchmark measures.

    Args:
        model: The model, which is served with made-up weights.
        options: The options of `vllm serve` that all servers have.
        slo: For each metric (`ttft`, `tpot`), the limit in milliseconds up to which a request counts for
            goodput.
        points: The points, in the order in which the tables show them.
        resident: Whether all servers of an engine run at the same time, one busy and the others idle. Each is
            then started only once, but all of them need memory at the same time.
        env: Environment variables for the servers.
        asynchronous: Whether the engine prepares a step while the model computes the one before, as vLLM does
            on CUDA.
    """

    model: Model
    options: tuple[str, ...]
    slo: Mapping[str, float]
    points: tuple[Point, ...]
    resident: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    asynchronous: bool = True

    def chosen(self, text: str) -> "Setup":
        """The setup with only those points that have `text` in their label, ignoring case.

        Raises:
            ValueError: There are no such points.
        """
        points = tuple(point for point in self.points if text.lower() in point.label.lower())
        if not points:
            labels = ", ".join(repr(point.label) for point in self.points)
            raise ValueError(f"{text!r} is in none of {labels}")
        return replace(self, points=points)

    def server_options(self, engine: Engine, policy: Policy | None, folder: Path) -> list[str]:
        """The options of `vllm serve`.

        Args:
            engine: The options in which servers differ.
            policy: The plugin's policy. None for stock vLLM.
            folder: The folder in which a policy file is written, if the policy needs one.
        """
        options = [*self.options, *engine.options()]
        if policy is None:
            return options
        vtw: dict[str, Any] = {"layer": policy.stages[0].layer}
        if policy.ranking is not None:
            file = folder / f"{named(policy).replace(' ', '-')}.json"
            file.write_text(json.dumps(policy.to_json(self.model.served_as)))
            vtw = {"policy": str(file)}
        return [*options, "--model-impl=vtw", f"--additional-config={json.dumps({'vtw': vtw})}"]


def vary(
    sweep: str,
    workload: Workload,
    engine: Engine,
    policy: Policy,
    name: str,
    values: Mapping[int, dict[str, Any]],
) -> list[Point]:
    """The points of a sweep over one field of a workload.

    Args:
        sweep: What is varied, as tables name it.
        workload: The workload that is varied.
        engine: The options of the servers.
        policy: The plugin's policy.
        name: The field of the workload that is varied.
        values: The values of the field, and for each the other fields that have another value than in
            `workload`.
    """
    return [
        Point(sweep, f"{value:,}", replace(workload, **{name: value}, **more), engine, (policy,))
        for value, more in values.items()
    ]
