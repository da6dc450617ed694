"""Runs stock vLLM and the plugin over the points of a setup, in ABBA order."""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.server import Server, ServerError, serving
from benchmarks.serving.steps import Steps, logging_config, read_steps
from benchmarks.serving.sweeps import Engine, Point, Setup
from benchmarks.serving.workload import Workload, send

FORMAT = "vllm-vtw-serving/1"
TOLD_AT_START = re.compile(
    r"vtw:|KV cache size|KV cache memory|FlashAttention|attention backend|model runner"
)
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",  # in tokens
}
WARM_UP = Workload(requests=4, text=8, output=8)
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

    Raises:
        RuntimeError: A request failed.
        ValueError: A server's log does not tell of its steps.
    """
    model = setup.model.save(folder / "model")
    result: dict[str, Any] = {
        "format": FORMAT,
        **measured_on(),
        "setup": name,
        "model": asdict(setup.model),
        "slo_milliseconds": dict(setup.slo),
        "environment": dict(setup.env),
        "points": [asdict(point) for point in setup.points],
        "left_out": {},
        "runs": [],
    }
    total = sum(2 * (1 + len(point.layers)) for point in setup.points)
    began = time.monotonic()
    for engine, points in by_engine(setup.points):
        try:
            for run in runs_of(engine, points, setup, model):
                result["runs"].append(run)
                save(result)
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                point, side = setup.points[run["point"]], run["layer"]
                print(
                    f"[{len(result['runs'])}/{total}] {minutes}:{seconds:02} {point.sweep} {point.value}, "
                    f"{'stock' if side is None else f'vtw K = {side}'}: "
                    f"{run['output']['request_throughput']:.2f} requests/s",
                    flush=True,
                )
        except ServerError as failure:
            # The other engines' servers may well start: this card may be too small for the one.
            print(failure, file=sys.stderr)
            result["left_out"].update({str(number): str(failure) for number, _ in points})
            save(result)


def runs_of(
    engine: Engine, points: Sequence[tuple[int, Point]], setup: Setup, model: Path
) -> Iterator[dict[str, Any]]:
    """The runs of points of one engine."""

    def start(side: Side) -> AbstractContextManager[Server]:
        options = [*setup.options, *engine.options(), "--enable-logging-iteration-details"]
        if side is not None:
            vtw = json.dumps({"vtw": {"layer": side}})
            options += ["--model-impl=vtw", f"--additional-config={vtw}"]
        env = {"VLLM_LOGGING_CONFIG_PATH": str(logging_config(model).absolute()), **setup.env}
        return serving(model, *options, env=env)

    runs: Counter[tuple[int, Side]] = Counter()
    warm: set[str] = set()
    for number, side, server in palindromes(points, start, setup.resident):
        sent: dict[str, Any] = {
            "url": server.url,
            "model": model,
            "pixels": setup.model.pixels,
            "folder": model.parent,
            "slo": setup.slo,
        }
        if server.url not in warm:
            warm.add(server.url)
            send(WARM_UP, seed=WARM_UP_SEED, **sent)
        # Both sides are asked the same, and no server is asked the same twice.
        seed = 2 * number + runs[number, side]
        runs[number, side] += 1
        before, logged = server.metrics(), len(server.log())
        bench, output = send(setup.points[number].workload, seed=seed, **sent)
        after, log = server.metrics(), server.log()
        yield {
            "point": number,
            "layer": side,
            "seed": seed,
            "serve": server.command,
            "bench": bench,
            "start_up": told_at_start(log),
            "output": output,
            "steps": asdict(Steps.of(read_steps(log[logged:]), setup.asynchronous)),
            **{name: after[metric] - before[metric] for name, metric in COUNTED.items()},
        }


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
    for side in everywhere:
        with start(side) as server:
            for number, point in points:
                if side in (None, *point.layers):
                    yield number, side, server


def told_at_start(log: str) -> list[str]:
    """What a server's log says of memory, backends and withdrawal, before the first request."""
    lines = log.partition("Iteration(")[0].splitlines()
    return [re.sub(r"^.*?\d+\.\d{4} ", "", line) for line in lines if TOLD_AT_START.search(line)]
