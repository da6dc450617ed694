# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what a guard costs the requests of users, that is, throughput and latency at several shares.

    python -m benchmarks.guard_cost [--runs 6] [--output FILE]

Servers without a guard and with one at 1% and 10% get the same requests one after the other, in an order
that goes back as it came. Requests either arrive at random times that leave the server room, or all at once.
Nothing else should run at the same time. It takes about 12 minutes on two cores.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.server import Server, serving
from benchmarks.serving.models import Model
from benchmarks.serving.setups import CPU_OPTIONS, cpu_env
from benchmarks.serving.workload import Workload, send

MODEL = Model("8 layers of width 512", 8, 512, 1024, 8, 1024, 12, 4, 128)
LAYER = 4
SHARES = (0.0, 0.01, 0.1)
SLO = {"ttft": 5000.0}
METRICS = ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")


@dataclass(frozen=True)
class Arriving(Workload):
    """Requests that arrive at random times.

    Args:
        rate: The mean number of requests a second. Infinite if all arrive at once.
    """

    rate: float = float("inf")

    def options(self, pixels: int, seed: int, folder: Path) -> list[str]:
        return [*super().options(pixels, seed, folder), f"--request-rate={self.rate}"]


LOADS = {
    "with room": Arriving(requests=300, text=8, output=16, rate=10.0),
    "all at once": Arriving(requests=200, text=8, output=16),
}
WARM_UP = Arriving(requests=8, text=8, output=16)


def options(share: float) -> list[str]:
    """The options of a server whose guard has a share. 0 stands for a server without a guard."""
    guard = {"guard": {"share": share}} if share else {}
    return [
        *CPU_OPTIONS,
        "--max-model-len=512",
        f"--kv-cache-memory-bytes={64 << 20}",
        "--no-enable-prefix-caching",
        '--limit-mm-per-prompt={"image": 1}',
        "--model-impl=vtw",
        f"--additional-config={json.dumps({'vtw': {'layer': LAYER, **guard}})}",
    ]


def back_and_forth(runs: int) -> Iterator[float]:
    """The shares in the order in which they are measured, `runs` times each: up, down again, and so on."""
    for number in range(runs):
        yield from SHARES if number % 2 == 0 else reversed(SHARES)


def guard_counts(server: Server) -> dict[str, float]:
    """What a server's guard has counted."""
    counted = server.metrics()
    names = {name: name.removeprefix("vllm:vtw_guard_").removesuffix("_total") for name in counted}
    return {
        short: counted[name]
        for name, short in names.items()
        if name.startswith("vllm:vtw_guard_") and name.endswith("_total")
    }


def wait_until_idle(server: Server) -> None:
    """Waits until a server has no requests and its guard has read what it had left."""
    quiet = 0
    while quiet < 4:
        quiet = 0 if server.metrics()["vllm:num_requests_running"] else quiet + 1
        time.sleep(0.5)


def measured(runs: int, folder: Path) -> list[dict[str, Any]]:
    """Measures every share `runs` times at each load.

    Args:
        runs: The number of runs of each share and load.
        folder: The folder for the model.
    """
    model = MODEL.save(folder / "model")
    results = []
    with ExitStack() as stack:
        servers = {
            share: stack.enter_context(serving(model, *options(share), env=cpu_env())) for share in SHARES
        }

        def ask(server: Server, workload: Workload, seed: int) -> dict[str, Any]:
            _, output = send(
                workload,
                url=server.url,
                model=model,
                pixels=MODEL.pixels(),
                seed=seed,
                slo=SLO,
                folder=folder,
            )
            wait_until_idle(server)
            return output

        for server in servers.values():
            ask(server, WARM_UP, 10**6)
        for load, workload in LOADS.items():
            turns = dict.fromkeys(SHARES, 0)
            for share in back_and_forth(runs):
                server, seed = servers[share], random.Random(f"{load} {turns[share]}").randrange(10**6)
                turns[share] += 1
                before = guard_counts(server)
                output = ask(server, workload, seed)
                after = guard_counts(server)
                counts = {name: count - before.get(name, 0) for name, count in after.items()}
                run = {name: output[name] for name in METRICS}
                results.append({"load": load, "share": share, "seed": seed, **run, "guard": counts})
                print(
                    f"{load}, {share:.0%}: {run['request_throughput']:.2f} requests/s, {counts}", flush=True
                )
    return results


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each load and share, the medians over runs, and their ratios to those without a guard."""
    rows = []
    for load in LOADS:
        medians = {}
        for share in SHARES:
            of_share = [run for run in runs if run["load"] == load and run["share"] == share]
            medians[share] = {name: median(run[name] for run in of_share) for name in METRICS}
            rows.append(
                {
                    "load": load,
                    "share": share,
                    **medians[share],
                    "ratios": {name: medians[share][name] / medians[0.0][name] for name in METRICS},
                    "read": sum(run["guard"].get("requests", 0) for run in of_share),
                    "left_out": sum(run["guard"].get("left_out", 0) for run in of_share),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=6, help="of each share at each load")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        runs = measured(arguments.runs, Path(folder))
    rows = compared(runs)
    for row in rows:
        ratios = ", ".join(f"{name} x {row['ratios'][name]:.3f}" for name in METRICS)
        print(
            f"{row['load']}, {row['share']:.0%}: {ratios}; {row['read']:g} read, {row['left_out']:g} left out"
        )
    if arguments.output:
        report = {**measured_on(), "options": options(0.0), "runs": runs, "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
