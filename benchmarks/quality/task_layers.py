# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures a layer for each task, beside one K and gates, and what the guard sees, beside `vtw calibrate`.

    python -m benchmarks.quality.task_layers [--calibrated 384] [--samples 500] [--check 25] [--out FILE.json]

`vtw calibrate --per-task` finds the layers on the validation split, and the engine serves its policy file to
requests of the test split that name their tasks. The rows of stock vLLM, VTW and gates are those that `dyvte`
wrote into `benchmarks/results/dyvte.json`. Then requests choose several K for the questions that were
calibrated on, and a guard reads all of their answers again.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from math import sqrt
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.calibration import QUALITY
from benchmarks.quality.data import write_data
from benchmarks.quality.dyvte import largest_gap, mean_right, prices
from benchmarks.quality.evaluate import OPTIONS, TIE, Answer, Sample, Score, percent, positive, score
from benchmarks.quality.model import CHECKPOINT, LAYERS, MAX_ANSWER_TOKENS, PICTURE_PART, question_part
from benchmarks.quality.tasks import TASKS, samples
from vllm_vtw.policy import Policy
from vllm_vtw.search.checkpoint import read_config, supported_model
from vllm_vtw.search.model import HFModel, Placement

GATES = QUALITY.with_name("dyvte.json")
GUARDED = (6, 8, 9, 10)
"""The values of K at which the guard is compared with the calibration."""


def calibrated(number: int, out: Path) -> dict[str, Any]:
    """Runs `vtw calibrate --per-task`. Returns the result that it prints as JSON.

    Args:
        number: The number of samples of all tasks together.
        out: The folder for the data and the results.
    """
    data = write_data(out, list(TASKS), number)
    options = {"data": data, "limit": number, "max-tokens": MAX_ANSWER_TOKENS, "out": out / "calibrated"}
    command = [str(Path(sys.executable).with_name("vtw")), "calibrate", str(CHECKPOINT), "--per-task"]
    command += ["--json", *(f"--{name}={value}" for name, value in options.items())]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def asked_with(llm: Any, asked: Sequence[Sample], choice: Mapping[str, Any]) -> list[Answer]:
    """The answers of an engine to requests with the same choice, with greedy decoding."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": PICTURE_PART + question_part(question.text), "multi_modal_data": {"image": picture}}
        for picture, question in asked
    ]
    params = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS, extra_args=dict(choice))
    return [
        Answer(
            output.outputs[0].text.strip(), list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        )
        for output in llm.generate(prompts, params, use_tqdm=False)
    ]


def engine(vtw: Mapping[str, Any]) -> Any:
    """An engine in this process, with these options of the plugin."""
    from vllm import LLM

    plugin: dict[str, Any] = {"model_impl": "vtw", "additional_config": {"vtw": dict(vtw)}}
    return LLM(model=str(CHECKPOINT), **OPTIONS, **plugin)


def served(policy_file: Path, asked: Mapping[str, Sequence[Sample]]) -> dict[str, list[Answer]]:
    """The answers to each task's requests, which name the task."""
    llm = engine({"policy": str(policy_file)})
    return {task: asked_with(llm, of_task, {"vtw_task": task}) for task, of_task in asked.items()}


def guarded(asked: Mapping[str, Sequence[Sample]]) -> dict[str, dict[int, tuple[int, int]]]:
    """What a guard that reads every answer counts.

    Returns:
        By task and K, the number of tokens, and of those that the full model would not have chosen.
    """
    from vllm_vtw.kv.guard import MAX_QUEUE

    llm = engine({"layers": list(GUARDED), "align": False, "guard": {"share": 1}})
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for task, of_task in tqdm(asked.items(), desc="guard"):
        found[task] = {}
        for layer in GUARDED:
            counts: Counter[str] = Counter()
            for start in range(0, len(of_task), MAX_QUEUE):
                asked_with(llm, of_task[start : start + MAX_QUEUE], {"vtw_layer": layer})
                while scheduler.has_requests():
                    llm.llm_engine.step()
                counts.update(scheduler.statistics.take())
            assert not any(name.startswith("guard_left_out/") for name in counts)
            assert counts[f"guard_requests/{layer}/"] == len(of_task)
            tokens, changed = (counts[f"guard_{kind}_tokens/{layer}/"] for kind in ("greedy", "changed"))
            found[task][layer] = tokens, changed
    return found


def agreement(guard: tuple[int, int], calibrated: tuple[int, float]) -> dict[str, Any]:
    """Compares the shares of changed tokens that a guard and a calibration found.

    Args:
        guard: The number of tokens, and of changed ones.
        calibrated: The number of tokens, and the share of changed ones.

    Returns:
        The shares, and their difference in standard errors, as if tokens were independent.
    """
    (tokens, changed), (others, share) = guard, calibrated
    pooled = (changed + share * others) / (tokens + others)
    error = sqrt(pooled * (1 - pooled) * (1 / tokens + 1 / others))
    return {
        "tokens": tokens,
        "guard": changed / tokens,
        "calibrate": share,
        "errors": (changed / tokens - share) / error if error else 0.0,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of work, KV memory and accuracies, all in percent."""
    head = ["", "work", "KV", *TASKS, "caption, objects", "mean"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        cells = [f"{100 * share:.1f}" for share in (row["prefill_flops_share"], row["kv_share"])]
        cells += [*percent(Score(**row["engine"])), f"{100 * mean_right(row):.1f}"]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return "\n".join(lines)


def guard_table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """A Markdown table of the percentage of changed tokens by the guard and by the calibration."""
    head = ["task", *(f"K = {layer}" for layer in GUARDED)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * len(GUARDED)}"]
    for task, by_layer in found.items():
        cells = [
            f"{100 * one['guard']:.1f}, {100 * one['calibrate']:.1f} ({one['errors']:+.1f})"
            for one in by_layer.values()
        ]
        lines.append(f"| {' | '.join([task, *cells])} |")
    return "\n".join(lines)


def of_tasks(
    policy: Policy,
    asked: Mapping[str, Sequence[Sample]],
    given: Mapping[str, Sequence[Answer]],
    check: int,
) -> dict[str, Any]:
    """The row of a policy that has a layer for each task.

    Args:
        policy: The policy.
        asked: The images and questions, by task.
        given: The engine's answers.
        check: The number of answers to each task that the reference reads.
    """
    config = read_config(str(CHECKPOINT))
    model = supported_model(config)
    parameters = HFModel(str(CHECKPOINT), config, Placement.of("cpu", "float32", config)).layer_parameters
    work, memory = [], []
    for task, answers in given.items():
        layer = policy.tasks[task]
        for price in prices(answers, config.image_token_id, parameters, model.hidden_size):
            work.append(price.flops_share(Policy.withdraw_at(layer, LAYERS)))
            memory.append(price.kv_share_at_exit(policy, policy.exit_stage(layer)))
    read = [
        (sample, answer, policy.tasks[task])
        for task in asked
        for sample, answer in islice(zip(asked[task], given[task], strict=True), check)
    ]
    everything = [sample for of_task in asked.values() for sample in of_task]
    answered = [answer for of_task in given.values() for answer in of_task]
    return {
        "name": "a layer for each task",
        "tasks": dict(policy.tasks),
        "prefill_flops_share": mean(work),
        "kv_share": mean(memory),
        "engine": asdict(score(everything, answered)),
        "largest_gap": largest_gap(read),
    }


def beside() -> list[dict[str, Any]]:
    """The rows of stock vLLM, of one K for all tasks, and of gates."""
    rows = json.loads(GATES.read_text())["rows"]
    return [
        row
        for row in rows
        if row["name"] == "stock" or row["name"].endswith(("calibrate`", "K = 8", "K = 6", "t = 0", "t = 2"))
    ]


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # `guarded` looks into the scheduler.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calibrated", type=positive, default=384, help="samples of the validation split")
    parser.add_argument("--samples", type=positive, default=500, help="of each task, of the test split")
    parser.add_argument("--check", type=positive, default=0, help="answers to each task for the reference")
    parser.add_argument("--out", type=Path, help="results as JSON, with tables beside it")
    options = parser.parse_args()
    asked = {task: list(islice(samples("test", task), options.samples)) for task in TASKS}
    seen = {
        task: list(islice(samples("validation", task), options.calibrated // len(TASKS))) for task in TASKS
    }
    fresh = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as engines,
    ):
        result = calibrated(options.calibrated, Path(folder))
        file = Path(folder) / "calibrated" / "policy.json"
        policy = Policy.read(file, result["model"])
        given = engines.submit(served, file, asked).result()
        row = of_tasks(policy, asked, given, options.check)
        found = engines.submit(guarded, seen).result()
    compared = {
        task: {
            layer: agreement(
                found[task][layer],
                (
                    result["tasks"][task]["tokens"],
                    result["curves"][task]["token_change"][result["layers"].index(layer)],
                ),
            )
            for layer in GUARDED
        }
        for task in TASKS
    }
    rows = [*beside(), row]
    shown = f"{table(rows)}\n\n{guard_table(compared)}"
    print(f"\n{shown}\n")
    if options.out:
        report = measured_on() | {
            "calibrated": options.calibrated,
            "samples_per_task": options.samples,
            "checked_per_task": options.check,
            "per_task": result["per_task"],
            "row": row,
            "guard": compared,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(shown + "\n")
    if row["largest_gap"] > TIE:
        sys.exit(f"the engine parts from the reference by {row['largest_gap']} logits")


if __name__ == "__main__":
    main()
