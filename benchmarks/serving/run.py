"""Runs stock vLLM and the plugin over the points of a setup, in ABBA order."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.server import Server, serving
from benchmarks.serving.steps import Steps, logging_config, read_steps
from benchmarks.serving.sweeps import Engine, Point, Setup
from benchmarks.serving.workload import Workload, send

FORMAT = "vllm-vtw-serving/1"
TOLD_AT_START = re.compile(r"vtw:|KV cache size|FlashAttention|attention backend|model runner")
WARM_UP = Workload(requests=2, text=8, output=4)
WARM_UP_SEED = 1_000_000
Side = int | None
"""K; None is stock vLLM."""


def measure(name: str, setup: Setup, folder: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures every point twice on every side, and has the result saved after each run.

    Args:
        name: Of the setup.
        setup: What to measure.
        folder: For the model and images. Relative, it leaves no trace of this machine in the result.
        save: Takes the result so far.
    """
    model = setup.model.save(folder / "model")
    result: dict[str, Any] = {
        "format": FORMAT,
        **measured_on(),
        "setup": name,
        "model": asdict(setup.model) | {"layer_parameters": setup.model.layer_parameters},
        "visual_tokens": setup.model.visual_tokens,
        "slo_milliseconds": dict(setup.slo),
        "environment": dict(setup.env),
        "points": [asdict(point) for point in setup.points],
        "runs": [],
    }
    total = sum(2 * (1 + len(point.layers)) for point in setup.points)
    began = time.monotonic()
    for engine, points in by_engine(setup.points):

        def start(side: Side, engine: Engine = engine) -> AbstractContextManager[Server]:
            options = [*setup.options, *engine.options(), "--enable-logging-iteration-details"]
            if side is not None:
                vtw = json.dumps({"vtw": {"layer": side}})
                options += ["--model-impl=vtw", f"--additional-config={vtw}"]
            env = {"VLLM_LOGGING_CONFIG_PATH": str(logging_config(folder).absolute()), **setup.env}
            return serving(model, *options, env=env)

        runs: Counter[tuple[int, Side]] = Counter()
        warm: set[str] = set()
        for number, side, server in palindromes(points, start, setup.resident):
            point = setup.points[number]
            sent: dict[str, Any] = {
                "url": server.url,
                "model": model,
                "pixels": setup.model.pixels,
                "folder": folder,
                "slo": setup.slo,
            }
            if server.url not in warm:
                warm.add(server.url)
                send(WARM_UP, seed=WARM_UP_SEED, **sent)
            # Both sides are asked the same, and no server is asked the same twice.
            seed = 2 * number + runs[number, side]
            runs[number, side] += 1
            preempted = server.metrics()["vllm:num_preemptions_total"]
            logged = len(server.log())
            bench, output = send(point.workload, seed=seed, **sent)
            result["runs"].append(
                {
                    "point": number,
                    "layer": side,
                    "seed": seed,
                    "serve": server.command,
                    "bench": bench,
                    "start_up": told_at_start(server.log()),
                    "output": output,
                    "steps": asdict(Steps.of(read_steps(server.log()[logged:]))),
                    "preemptions": server.metrics()["vllm:num_preemptions_total"] - preempted,
                }
            )
            save(result)
            minutes, seconds = divmod(int(time.monotonic() - began), 60)
            print(
                f"[{len(result['runs'])}/{total}] {minutes}:{seconds:02} {point.sweep} {point.value}, "
                f"{'stock' if side is None else f'vtw K = {side}'}: "
                f"{output['request_throughput']:.2f} requests/s",
                flush=True,
            )


def by_engine(points: Sequence[Point]) -> list[tuple[Engine, list[tuple[int, Point]]]]:
    """The points with their numbers, those of one engine together, in the order of their first."""
    engines: dict[Engine, list[tuple[int, Point]]] = {}
    for number, point in enumerate(points):
        engines.setdefault(point.engine, []).append((number, point))
    return list(engines.items())


def palindromes(
    points: Sequence[tuple[int, Point]],
    start: Callable[[Side], AbstractContextManager[Server]],
    resident: bool,
) -> Iterator[tuple[int, Side, Server]]:
    """Numbers of points with the side and the server whose turn it is.

    Each side has two turns, there and back, so that a machine that slows down does so for all alike: point
    by point where all servers are resident, otherwise all points at each start of a server.
    """

    def there_and_back(layers: Iterable[int]) -> list[Side]:
        sides = [None, *sorted(set(layers))]
        return [*sides, *reversed(sides)]

    everywhere = there_and_back(layer for _, point in points for layer in point.layers)
    if resident:
        with ExitStack() as stack:
            servers = {side: stack.enter_context(start(side)) for side in dict.fromkeys(everywhere)}
            for number, point in points:
                for side in there_and_back(point.layers):
                    yield number, side, servers[side]
        return
    for side, turns in groupby(everywhere):
        with start(side) as server:
            for _ in turns:
                for number, point in points:
                    if side in (None, *point.layers):
                        yield number, side, server


def told_at_start(log: str) -> list[str]:
    """What a server's log says of memory, backends and withdrawal, before the first request."""
    lines = log.partition("Iteration(")[0].splitlines()
    return [re.sub(r"^.*?\d+\.\d{4} ", "", line) for line in lines if TOLD_AT_START.search(line)]
