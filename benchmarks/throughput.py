"""Stock vLLM against `--model-impl vtw` in equal KV memory, in ABBA order, each run in a process of its own.

    python -m benchmarks.throughput [--dtype DTYPE] [--output FILE]

Requests of one picture each, all at once, with the same options for both. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import measured_on
from benchmarks.small_llava import PATCH_SIZE, SmallLlava

MODEL = SmallLlava(layers=16, hidden=1024, heads=16, kv_heads=16, image_side=24)
REQUESTS, OUTPUT_TOKENS = 32, 64
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": 32,
    "kv_cache_memory_bytes": 2 << 30,
    "enable_prefix_caching": False,
    "limit_mm_per_prompt": {"image": 1},
}
ORDER = ("stock", "vtw", "vtw", "stock")


def one_run(model: str, side: str, dtype: str, seed: int) -> float:
    """Requests per second of one engine, after a request that warms it up."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    options = OPTIONS | ({"model_impl": "vtw"} if side == "vtw" else {})
    llm = LLM(model=model, dtype=dtype, **options)
    rng = np.random.default_rng(seed)
    size = MODEL.image_side * PATCH_SIZE

    def request() -> dict[str, Any]:
        image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        return {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": image}}

    answer = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    llm.generate(request(), answer, use_tqdm=False)
    requests = [request() for _ in range(REQUESTS)]
    begin = time.perf_counter()
    llm.generate(requests, answer, use_tqdm=False)
    return REQUESTS / (time.perf_counter() - begin)


def run_all(dtype: str) -> dict[str, Any]:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        MODEL.save(Path(folder))
        for number, side in enumerate(ORDER):
            command = [
                sys.executable,
                "-m",
                "benchmarks.throughput",
                "--run",
                side,
                folder,
                dtype,
                str(number),
            ]
            env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
            printed = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            speed = float(printed.splitlines()[-1])
            print(f"{side:>6}: {speed:.3f} requests/s", flush=True)
            runs.append((side, speed))
    stock, vtw = (
        statistics.mean(speed for side, speed in runs if side == which) for which in ("stock", "vtw")
    )
    return {
        **measured_on(),
        "model": vars(MODEL),
        "requests": REQUESTS,
        "output_tokens": OUTPUT_TOKENS,
        "options": OPTIONS | {"dtype": dtype},
        "runs": [{"side": side, "requests_per_second": speed} for side, speed in runs],
        "ratio": vtw / stock,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--run", nargs=4, metavar=("SIDE", "MODEL", "DTYPE", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        side, model, dtype, seed = arguments.run
        print(one_run(model, side, dtype, int(seed)))
        return
    result = run_all(arguments.dtype)
    print(f"ratio: {result['ratio']:.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
