# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what gates that decide per request cost in answers, compared with VTW at one K for all requests.

    python -m benchmarks.quality.dyvte [--trained 600] [--samples 500] [--check 25] [--out FILE.json]

It trains gates on the validation split of all tasks with `vtw dyvte train`, one for every layer from 3 on,
and serves some of them at several thresholds. Accuracies and exits are those of the engine on the test split.
The accuracies of VTW are those that `evaluate` wrote into `benchmarks/results/quality.json`. With `--check`,
the transformers reference reads that many answers to each task, and the benchmark fails if it would have
given other ones.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.exits import by_number, logged_exits
from benchmarks.machine import measured_on
from benchmarks.quality.calibration import QUALITY
from benchmarks.quality.data import write_data
from benchmarks.quality.evaluate import OPTIONS, TIE, Answer, Sample, Score, answers, percent, positive, score
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS
from benchmarks.quality.plots import plot_exits
from benchmarks.quality.tasks import TASKS, samples
from vllm_vtw.commands.dyvte import default_layers
from vllm_vtw.policy import Gate, Policy, Stage
from vllm_vtw.search.checkpoint import read_config, supported_model
from vllm_vtw.search.model import HFModel, Placement
from vllm_vtw.search.price import Price, RequestTokens

CALIBRATED = QUALITY.with_name("calibration.json")
FIRST = 3
BORDERS = (tuple(default_layers(LAYERS)), (4, 6, 8, 10))
THRESHOLDS = (-1.0, 0.0, 1.0, 2.0)


def trained(data: Path, number: int, out: Path) -> dict[str, Any]:
    """Runs `vtw dyvte train`. Returns the result that it prints as JSON.

    Args:
        data: The data file.
        number: The number of samples.
        out: The command's folder for results.
    """
    vtw = str(Path(sys.executable).with_name("vtw"))
    options = {"data": data, "limit": number, "max-tokens": MAX_ANSWER_TOKENS, "out": out}
    options["layers"] = f"{FIRST}-{LAYERS - 1}"
    command = [vtw, "dyvte", "train", str(CHECKPOINT), "--json"]
    command += [f"--{name}={value}" for name, value in options.items()]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def served(policy_file: Path, asked: Sequence[Sample]) -> tuple[list[Answer], list[int]]:
    """Serves a policy with gates in an engine in this process.

    Args:
        policy_file: The policy file, in the folder of its gates.
        asked: The images and questions.

    Returns:
        The answers, and the layer at which each request's visual tokens left.
    """
    from vllm import LLM

    plugin: dict[str, Any] = {"model_impl": "vtw", "additional_config": {"vtw": {"policy": str(policy_file)}}}
    llm = LLM(model=str(CHECKPOINT), **OPTIONS, **plugin)
    # An engine configures logging when it starts, so exits can be read only after that.
    with logged_exits() as logged:
        given = answers(llm, asked)
    exits = by_number(logged)
    return given, [exits[number] for number in range(len(asked))]


def largest_gap(answered: Sequence[tuple[Sample, Answer, int]]) -> float:
    """The largest number of logits by which the reference prefers another token to the engine's.

    Args:
        answered: Samples, the engine's answers, and the layers at which visual tokens left.
    """
    from tests.engine.reference import Reference

    oracle, gaps = Reference(CHECKPOINT), [0.0]
    for (picture, _), answer, layer in tqdm(answered, desc="reference"):
        ids, start = answer.prompt + answer.said, len(answer.prompt)
        logits = oracle.logits(ids, [oracle.embeds(picture)], layer, oracle.dropped(ids, start, 1))
        of_answer = logits[start - 1 : -1]
        chosen = of_answer[range(len(answer.said)), answer.said]
        gaps.append(float((of_answer.max(-1).values - chosen).max()))
    return max(gaps)


def prices(given: Sequence[Answer], image_token: int, layer_parameters: int, hidden_size: int) -> list[Price]:
    """Computes what policies cost for each of several requests.

    Args:
        given: The answers to the requests.
        image_token: The id of the image token.
        layer_parameters: The number of parameters of a decoder layer.
        hidden_size: The decoder's hidden size.
    """
    found = []
    for answer in given:
        visual = answer.prompt.count(image_token)
        request = RequestTokens(visual, len(answer.prompt) - visual, len(answer.said))
        found.append(Price(LAYERS, layer_parameters, hidden_size, request))
    return found


def mean_right(row: Mapping[str, Any]) -> float:
    """The fraction of right answers, as a mean over tasks."""
    return mean(row["engine"]["right"].values())


def rival(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of VTW at the largest K that takes no more work than a row of gates. None if there is none."""
    vtw = [
        other
        for other in rows
        if other["layers"] is None and other["prefill_flops_share"] <= row["prefill_flops_share"]
    ]
    return max(vtw, key=lambda other: other["prefill_flops_share"]) if vtw else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables: work, KV memory and accuracies in percent, and the mean layers of exit.

    Work and KV memory are relative to stock vLLM's.
    """
    head = ["", "work", "KV", *TASKS, "caption, objects", "mean", "above VTW for no more work"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        cells = [f"{100 * share:.1f}" for share in (row["prefill_flops_share"], row["kv_share"])]
        cells += [*percent(Score(**row["engine"])), f"{100 * mean_right(row):.1f}"]
        other = rival(row, rows) if row["layers"] else None
        cells.append(f"{100 * (mean_right(row) - mean_right(other)):+.1f}, {other['name']}" if other else "")
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    gated = [row for row in rows if row["layers"]]
    lines += [
        "",
        f"| mean layer of exit | {' | '.join(TASKS)} | all |",
        f"| --- |{' ---: |' * (len(TASKS) + 1)}",
    ]
    for row in gated:
        layers = [row["exits"][task] for task in TASKS]
        cells = [f"{layer:.1f}" for layer in (*layers, mean(layers))]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return "\n".join(lines)


def vtw_rows(request_prices: Sequence[Price]) -> list[dict[str, Any]]:
    """The rows of stock vLLM and of VTW at every K.

    Args:
        request_prices: Compute what a policy costs for each request.
    """
    calibrated = json.loads(CALIBRATED.read_text())["results"]["all tasks"]["layer"]["answer"]
    rows = []
    for result in json.loads(QUALITY.read_text())["results"]:
        layer = result["layer"]
        policy = Policy.withdraw_at(layer, LAYERS)
        name = "stock" if layer == LAYERS else f"VTW, K = {layer}"
        rows.append(
            {
                "name": name + (", of `vtw calibrate`" if layer == calibrated else ""),
                "layers": None,
                "prefill_flops_share": mean(price.flops_share(policy) for price in request_prices),
                "kv_share": mean(price.kv_share(policy) for price in request_prices),
                "engine": result["engine"],
            }
        )
    return rows


def gated_row(
    policy: Policy,
    asked: Sequence[Sample],
    answered: tuple[Sequence[Answer], Sequence[int]],
    request_prices: Sequence[Price],
    check: int,
) -> dict[str, Any]:
    """The row of a policy with gates.

    Args:
        policy: The policy.
        asked: The images and questions.
        answered: The engine's answers, and the layers at which visual tokens left.
        request_prices: Compute what a policy costs for each request.
        check: The number of answers to each task that the reference reads.
    """
    given, exits = answered
    layers = [stage.layer for stage in policy.stages]
    assert policy.gate is not None
    stage_of = {LAYERS: None} | {layer: stage for stage, layer in enumerate(layers, 1)}
    by_task = {task: [at for at, (_, q) in enumerate(asked) if q.task == task] for task in TASKS}
    read = [(asked[at], given[at], exits[at]) for of_task in by_task.values() for at in of_task[:check]]
    priced = list(zip(request_prices, exits, strict=True))
    return {
        "name": f"gates at {', '.join(map(str, layers))}, t = {policy.gate.thresholds[0]:g}",
        "layers": layers,
        "prefill_flops_share": mean(
            price.flops_share(Policy.withdraw_at(layer, LAYERS)) for price, layer in priced
        ),
        "kv_share": mean(price.kv_share_at_exit(policy, stage_of[layer]) for price, layer in priced),
        "engine": asdict(score(asked, given)),
        "exits": {task: mean(exits[at] for at in of_task) for task, of_task in by_task.items()},
        "largest_gap": largest_gap(read),
    }


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # `logged_exits` reads the logs of its own process.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trained", type=positive, default=600, help="samples of the validation split")
    parser.add_argument("--samples", type=positive, default=500, help="of each task, of the test split")
    parser.add_argument("--check", type=positive, default=0, help="answers to each task for the reference")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table and a plot beside it")
    options = parser.parse_args()
    asked = [sample for task in TASKS for sample in islice(samples("test", task), options.samples)]
    config = read_config(str(CHECKPOINT))
    model = supported_model(config)
    parameters = HFModel(str(CHECKPOINT), config, Placement.of("cpu", "float32", config)).layer_parameters
    rows: list[dict[str, Any]] = []
    fresh = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as engines,
    ):
        data, out = write_data(Path(folder), list(TASKS), options.trained), Path(folder) / "out"
        started = time.monotonic()
        training = trained(data, options.trained, out)
        seconds = round(time.monotonic() - started, 1)
        gate = json.loads((out / "policy.json").read_text())["gate"]
        for borders, threshold in product(BORDERS, THRESHOLDS):
            weights = Gate(gate["weights"], gate["sha256"], (threshold,) * len(borders))
            policy = Policy(tuple(Stage(layer, 0.0) for layer in borders), weights)
            file = out / "served.json"
            file.write_text(json.dumps(policy.to_json(model.as_dict())))
            answered = engines.submit(served, file, asked).result()
            request_prices = prices(answered[0], config.image_token_id, parameters, model.hidden_size)
            rows = rows or vtw_rows(request_prices)
            rows.append(gated_row(policy, asked, answered, request_prices, options.check))
            print(f"\n{table(rows)}\n", flush=True)
    if options.out:
        told = ("layers", "may_leave", "held_out_may_leave", "curves")
        report = measured_on() | {
            "trained": options.trained,
            "training_seconds": seconds,
            "training": {key: training[key] for key in told},
            "samples_per_task": options.samples,
            "checked_per_task": options.check,
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows) + "\n")
        plot_exits(rows, options.out.with_suffix(".png"))
    worst = max(row.get("largest_gap", 0.0) for row in rows)
    if worst > TIE:
        sys.exit(f"the engine parts from the reference by {worst} logits")


if __name__ == "__main__":
    main()
