"""Measures stock vLLM against the plugin at equal KV memory.

    python -m benchmarks.serving [small | cards | full] [--output FILE]

`small` takes two cores of a CPU, the others one GPU. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from benchmarks.server import ServerError
from benchmarks.serving.run import measure
from benchmarks.serving.show import write_plots, write_tables
from benchmarks.serving.sweeps import SETUPS

FOLDER = Path(".cache/serving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("setup", nargs="?", choices=SETUPS, default="small")
    parser.add_argument("--only", help="measure the sweeps alone whose name or value contains this")
    parser.add_argument("--output", type=Path, help="JSON file; tables and plots go beside it")
    arguments = parser.parse_args()
    output = arguments.output or FOLDER / f"{'-'.join(filter(None, (arguments.setup, arguments.only)))}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    setup = SETUPS[arguments.setup]()
    if arguments.only:
        chosen = [point for point in setup.points if arguments.only in f"{point.sweep} {point.value}"]
        if not chosen:
            parser.error(f"no sweep's name or value contains {arguments.only!r}")
        setup = replace(setup, points=tuple(chosen))

    def save(result: dict[str, Any]) -> None:
        command = f"python -m benchmarks.serving {' '.join(sys.argv[1:])}".strip()
        whole = output.with_suffix(".part")
        whole.write_text(json.dumps({**result, "command": command}, indent=1) + "\n")
        whole.replace(output)  # what was measured so far outlives an interruption

    measure(arguments.setup, setup, FOLDER, save)
    written = write_tables(output)
    print(written.read_text())
    print(f"{output}, {written}, {write_plots(output)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `serving` has ended its servers
    except ServerError as failure:
        sys.exit(str(failure))
