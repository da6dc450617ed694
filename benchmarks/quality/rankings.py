# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Measures what every ranking costs in answers at several budgets of work, beside VTW and plain baselines.

    python -m benchmarks.quality.rankings [--samples 300] [--check 20] [--out FILE.json]

Rankings by image keep a fraction of visual tokens from layer 0 on, and rankings by question from layer 2 on,
as FastV does (arXiv 2403.06764). `random` and `uniform` are the plain baselines. The trained model makes the
same number of tokens of every picture, so a lower resolution would save nothing, and is not among them. The
accuracies are those of the engine on the test split. With `--check`, the transformers reference reads that
many answers to each task, and the benchmark fails if it would have given other ones.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from benchmarks.machine import measured_on
from benchmarks.quality.dyvte import mean_right, prices
from benchmarks.quality.evaluate import TIE, Answer, Sample, Score, engine_answers, percent, positive, score
from benchmarks.quality.model import CHECKPOINT, LAYERS, SIDE
from benchmarks.quality.plots import plot_rankings
from benchmarks.quality.tasks import TASKS, samples
from vllm_vtw.policy import BY_IMAGE, BY_QUESTION, Policy, Stage
from vllm_vtw.search.checkpoint import read_config, supported_model
from vllm_vtw.search.model import HFModel, Placement
from vllm_vtw.search.schedules.baselines import FASTV_LAYER, PLAIN
from vllm_vtw.search.schedules.schedule import GRID

WORK = (0.8, 0.65, 0.5, 0.35)
"""The budgets: the largest fractions of the full decoder's work on a prompt."""
NAMES = {"last-token-attention": "last-token-attention (FastV)", "variation": "variation (V2Drop)"}
NAMES |= {"diversity": "diversity (DivPrune)"}


def candidates() -> dict[str, list[Policy]]:
    """By the name of a method: its policies, from the one that takes least work on."""
    keeps = [part / GRID for part in range(1, GRID)]
    found = {"VTW": [Policy.withdraw_at(layer, LAYERS) for layer in range(1, LAYERS)]}
    for ranking in (*BY_IMAGE, *BY_QUESTION):
        layer = 0 if ranking in BY_IMAGE else FASTV_LAYER
        policies = [Policy((Stage(layer, keep),), ranked_by=ranking) for keep in keeps]
        found[NAMES.get(ranking, ranking)] = policies
    return found


def chosen(budget: float, share: Callable[[Policy], float]) -> dict[str, Policy]:
    """The policy of each method that withdraws least within a budget of work."""
    return {
        name: affordable[-1]
        for name, policies in candidates().items()
        if (affordable := [policy for policy in policies if share(policy) <= budget])
    }


def said(policy: Policy) -> str:
    """A policy in a few words."""
    (stage,) = policy.stages
    return f"{stage.keep:.3f} from layer {stage.layer} on" if stage.keep else f"K = {stage.layer}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of work, KV memory and accuracies in percent, and sentences that summarise it."""
    head = ["work", "method", "keeps", "KV", *TASKS, "caption, objects", "mean", "above random"]
    lines = [f"| {' | '.join(head)} |", f"| ---: | --- | --- |{' ---: |' * (len(head) - 3)}"]
    for row in rows:
        plain = [other for other in rows if (other["budget"], other["method"]) == (row["budget"], "random")]
        is_compared = plain and row not in plain
        above = f"{100 * (mean_right(row) - mean_right(plain[0])):+.1f}" if is_compared else ""
        cells = [f"{100 * row['kv_share']:.1f}", *percent(Score(**row["engine"]))]
        cells += [f"{100 * mean_right(row):.1f}", above]
        start = f"| {100 * row['prefill_flops_share']:.1f} | {row['method']} | {row['keeps']} | "
        lines.append(f"{start}{' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in sentences(rows))])


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the percentage of right answers, mean over tasks, by method and budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] < 1))
    by_method: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["budget"]] = row
    stock = by_method.pop("stock")[1.0]
    heads = [f"{100 * budget:g}% of the work" for budget in budgets]
    lines = [
        f"| stock: {100 * mean_right(stock):.1f} | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(budgets)}",
    ]
    for method, of_budget in by_method.items():
        cells = [f"{100 * mean_right(of_budget[budget]):.1f}" for budget in budgets]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each budget: which method is best, and which are no better than a plain baseline."""
    found = []
    for budget in dict.fromkeys(row["budget"] for row in rows if row["budget"] < 1):
        of_budget = [row for row in rows if row["budget"] == budget]
        best = max(of_budget, key=mean_right)
        plain = max((row for row in of_budget if row["method"] in PLAIN), key=mean_right)
        least = mean_right(plain)
        below = [row["method"] for row in of_budget if mean_right(row) < least] or ["none"]
        found.append(
            f"At {100 * budget:g}% of the work, {best['method']} is best, {100 * mean_right(best):.1f}% "
            f"right, mean over tasks. Below {plain['method']} ({100 * least:.1f}%): {', '.join(below)}."
        )
    return found


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of results."""
    return f"{summary(rows)}\n\n{table(rows)}"


def largest_gap(policy: Policy, answered: Sequence[tuple[Sample, Answer]]) -> float:
    """The largest number of logits by which the reference prefers another token to the engine's.

    Args:
        policy: The policy, whose ranking may not be `random`: vLLM's hash of an image is not known here.
        answered: Samples and the engine's answers.
    """
    from tests.engine.image_orders import dithered, diverse
    from tests.engine.reference import Reference

    oracle, gaps = Reference(CHECKPOINT), [0.0]
    (stage,) = policy.stages
    for (picture, _), answer in tqdm(answered, desc="reference"):
        ids, embeds = answer.prompt + answer.said, oracle.embeds(picture)
        if policy.ranking in BY_IMAGE:
            order = dithered(SIDE) if policy.ranking == "uniform" else diverse(embeds)
            visual = [position for position, token in enumerate(ids) if token == oracle.image_token]
            leaving = {visual[token] for token in order[stage.kept(len(visual)) :]}
            logits = oracle.selected_logits(ids, [embeds], {0: leaving})[-len(answer.said) - 1 : -1]
        else:
            ranking = policy.ranking or "last-token-attention"
            schedule = {stage.layer: stage.keep}
            logits = oracle.ranked_logits(ids, [embeds], schedule, len(answer.prompt), ranking)[:-1]
        of_answer = logits[range(len(answer.said)), answer.said]
        gaps.append(float((logits.max(-1).values - of_answer).max()))
    return max(gaps)


def measured(policy: Policy, model: Mapping[str, Any], asked: Sequence[Sample], check: int) -> dict[str, Any]:
    """Serves a policy, and returns the score of its answers.

    Args:
        policy: The policy.
        model: What a policy file says about the model.
        asked: The images and questions.
        check: The number of answers to each task that the reference reads. 0 for none.
    """
    content = policy.to_json(dict(model))
    given = engine_answers(CHECKPOINT, {"policy": content, "align": False}, asked)
    found: dict[str, Any] = {"engine": asdict(score(asked, given))}
    if check and policy.ranking != "random":
        by_task = groupby(zip(asked, given, strict=True), lambda one: one[0][1].task)
        found["largest_gap"] = largest_gap(policy, [p for _, pairs in by_task for p in islice(pairs, check)])
    return found


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=positive, default=300, help="of each task, of the test split")
    parser.add_argument("--check", type=positive, default=0, help="answers to each task for the reference")
    parser.add_argument("--out", type=Path, help="results as JSON, with a table and a plot beside it")
    options = parser.parse_args()
    asked = [sample for task in TASKS for sample in islice(samples("test", task), options.samples)]
    given = engine_answers(CHECKPOINT, None, asked)
    config = read_config(str(CHECKPOINT))
    model = supported_model(config)
    parameters = HFModel(str(CHECKPOINT), config, Placement.of("cpu", "float32", config)).layer_parameters
    of_requests = prices(given, config.image_token_id, parameters, model.hidden_size)

    def work(policy: Policy) -> float:
        return mean(price.flops_share(policy) for price in of_requests)

    stock = {"budget": 1.0, "method": "stock", "keeps": "all", "prefill_flops_share": 1.0, "kv_share": 1.0}
    rows: list[dict[str, Any]] = [stock | {"engine": asdict(score(asked, given))}]
    for budget in WORK:
        for method, policy in chosen(budget, work).items():
            row = {
                "budget": budget,
                "method": method,
                "keeps": said(policy),
                "prefill_flops_share": work(policy),
                "kv_share": mean(price.kv_share(policy) for price in of_requests),
                "policy": policy.to_json(model.as_dict()),
            }
            rows.append(row | measured(policy, model.as_dict(), asked, options.check))
        print(f"\n{table(rows)}\n", flush=True)
    if options.out:
        report = measured_on() | {
            "samples_per_task": options.samples,
            "checked_per_task": options.check,
            "layers": LAYERS,
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(page(rows) + "\n")
        plot_rankings(rows, options.out.with_suffix(".png"))
    worst = max(row.get("largest_gap", 0.0) for row in rows)
    if worst > TIE:
        sys.exit(f"the engine parts from the reference by {worst} logits")


if __name__ == "__main__":
    main()
