# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures stock vLLM and the plugin at the points of a setup, in the order ABBA."""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.server import Server, ServerError, serving
from benchmarks.serving.compare import FORMAT, named
from benchmarks.serving.steps import Steps, logging_config, read_steps
from benchmarks.serving.sweeps import Engine, Point, Setup, told
from benchmarks.serving.workload import Workload, send
from vllm_vtw.policy import Policy

TOLD_AT_START = re.compile(
    r"vtw:|KV cache size|KV cache memory|FlashAttention|attention backend|model runner"
)
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",  # It counts tokens.
}
WARM_UP = Workload(requests=4, text=8, output=8)
WARM_UP_SEED = 1_000_000
Side = Policy | None
"""What is compared: the plugin with a policy, or None for stock vLLM."""


def measure(
    name: str,
    setup: Setup,
    folder: Path,
    save: Callable[[dict[str, Any]], None],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures every point twice on every side.

    If a server of an engine does not start, or fails, all points of that engine are left out.

    Args:
        name: The name of the setup.
        setup: What to measure.
        folder: The folder for the model and images. The result contains this path, so a relative one says
            nothing about this machine.
        save: Called with the result so far after each run.
        earlier: The result of an interrupted benchmark, which is continued. If runs of an engine are missing,
            all points of that engine are measured again.

    Returns:
        The result.

    Raises:
        ValueError: `earlier` is the result of something else, or a server's log does not report its steps.
    """
    model = setup.model.save(folder / "model")
    result: dict[str, Any] = {
        "format": FORMAT,
        **measured_on(),
        "setup": name,
        "model": asdict(setup.model),
        "slo_milliseconds": dict(setup.slo),
        "environment": dict(setup.env),
        "points": json.loads(json.dumps([told(point) for point in setup.points])),
        "left_out": {},
        "runs": [],
    }
    if earlier is not None:
        for key in result.keys() - {"when", "left_out", "runs"}:
            if earlier[key] != result[key]:
                raise ValueError(f"what was measured before has another {key.replace('_', ' ')}")
        result["runs"] = earlier["runs"]
    total = sum(2 * (1 + len(point.policies)) for point in setup.points)
    began = time.monotonic()
    for engine, points in by_engine(setup.points):
        numbers = [number for number, _ in points]
        before = [run for run in result["runs"] if run["point"] in numbers]
        if len(before) == sum(2 * (1 + len(point.policies)) for _, point in points):
            continue
        result["runs"] = [run for run in result["runs"] if run not in before]
        try:
            for side, run in runs_of(engine, points, setup, model):
                result["runs"].append(run)
                save(result)
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                label = setup.points[run["point"]].label
                print(
                    f"[{len(result['runs'])}/{total}] {minutes}:{seconds:02} "
                    f"{label}, {side_named(side)}: {run['output']['request_throughput']:.2f} requests/s",
                    flush=True,
                )
        except ServerError as failure:
            # Servers of other engines may still start, for example if this GPU is too small for this one.
            print(failure, file=sys.stderr)
            result["runs"] = [run for run in result["runs"] if run["point"] not in numbers]
            result["left_out"].update({str(number): why(failure) for number in numbers})
            save(result)
    return result


def side_named(side: Side) -> str:
    """The name of a side in messages."""
    return "stock vLLM" if side is None else f"the plugin, {named(side)}"


def why(failure: ServerError) -> str:
    """The last line of a failure that names an error, or its first line if none does."""
    lines = [line for line in str(failure).splitlines() if "Error: " in line]
    return re.sub(r"^.*?(\w+Error: )", r"\1", lines[-1]) if lines else str(failure).splitlines()[0]


def runs_of(
    engine: Engine, points: Sequence[tuple[int, Point]], setup: Setup, model: Path
) -> Iterator[tuple[Side, dict[str, Any]]]:
    """Starts the servers of one engine, and measures its points.

    Args:
        engine: The options of the servers.
        points: The points and their numbers in the setup.
        setup: The setup.
        model: The folder of the model.

    Yields:
        Each run, and the side that it belongs to.

    Raises:
        ServerError: A server did not start, or failed.
    """

    def ask(server: Server, workload: Workload, seed: int) -> tuple[list[str], dict[str, Any]]:
        try:
            return send(
                workload,
                url=server.url,
                model=model,
                pixels=setup.model.pixels(workload.image_side),
                seed=seed,
                slo=setup.slo,
                folder=model.parent,
            )
        except (RuntimeError, OSError) as failure:
            raise ServerError(f"{failure}\n{server.complaint()}") from failure

    @contextmanager
    def start(side: Side) -> Iterator[Server]:
        options = [*setup.server_options(engine, side, model.parent), "--enable-logging-iteration-details"]
        env = {"VLLM_LOGGING_CONFIG_PATH": str(logging_config(model).absolute()), **setup.env}
        print(f"starting {side_named(side)}", flush=True)
        with serving(model, *options, env=env) as server:
            ask(server, WARM_UP, WARM_UP_SEED)
            yield server

    turns: Counter[tuple[int, Side]] = Counter()
    for number, side, server in palindromes(points, start, setup.resident):
        # All sides get the same requests, and no server gets the same requests twice.
        seed = 2 * number + turns[number, side]
        turns[number, side] += 1
        before, logged = server.metrics(), len(server.log())
        bench, output = ask(server, setup.points[number].workload, seed)
        after, log = server.metrics(), server.log()
        yield (
            side,
            {
                "point": number,
                "policy": side and told(side),
                "seed": seed,
                "serve": server.command,
                "bench": bench,
                "start_up": told_at_start(log),
                "output": output,
                "steps": asdict(Steps.of(read_steps(log[logged:]), setup.asynchronous)),
                **{name: after[metric] - before[metric] for name, metric in COUNTED.items()},
            },
        )


def by_engine(points: Sequence[Point]) -> list[tuple[Engine, list[tuple[int, Point]]]]:
    """The points and their numbers, grouped by engine. Engines are in the order of their first points."""
    engines: dict[Engine, list[tuple[int, Point]]] = {}
    for number, point in enumerate(points):
        engines.setdefault(point.engine, []).append((number, point))
    return list(engines.items())


def palindromes(
    points: Sequence[tuple[int, Point]],
    start: Callable[[Side], AbstractContextManager[Server]],
    resident: bool,
) -> Iterator[tuple[int, Side, Server]]:
    """Decides the order of the runs, and starts the servers for them.

    Every side has two runs of each point, in a forward and a backward pass over the sides. If the machine
    becomes slower over time, it does so for all sides alike.

    Args:
        points: The points and their numbers.
        start: Starts the server of a side.
        resident: Whether all servers run at the same time. Both passes are then made for one point after the
            other. If not, one server runs at a time, and each of its starts measures all points.

    Yields:
        For each run, the number of the point, the side, and its server.
    """

    def there_and_back(policies: Iterable[Policy]) -> list[Side]:
        sides = [None, *dict.fromkeys(policies)]
        return [*sides, *reversed(sides)]

    everywhere = there_and_back(policy for _, point in points for policy in point.policies)
    if resident:
        with ExitStack() as stack:
            servers = {side: stack.enter_context(start(side)) for side in dict.fromkeys(everywhere)}
            for number, point in points:
                for side in there_and_back(point.policies):
                    yield number, side, servers[side]
        return
    for side in everywhere:
        with start(side) as server:
            for number, point in points:
                if side in (None, *point.policies):
                    yield number, side, server


def told_at_start(log: str) -> list[str]:
    """The lines of a server's log about memory, backends and withdrawal, up to its first step."""
    lines = log.partition("Iteration(")[0].splitlines()
    return [re.sub(r"^.*?\d+\.\d{4} ", "", line) for line in lines if TOLD_AT_START.search(line)]
