# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What `vtw guard` prints."""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from vllm_vtw.commands.guard_advice import advice
from vllm_vtw.commands.guard_counts import Answers, GuardCounts
from vllm_vtw.commands.metrics_page import plain
from vllm_vtw.commands.token_change import UNCLEAR, more_tokens, verdict, wilson_interval

HEADER = ("task", "layer", "read again", "greedy tokens", "changed (95% interval)", "nats apart", "verdict")
LEFT_ALIGNED = ("task", "verdict")
REASONS = {
    "queue_full": "because the guard's queue was full",
    "no_room": "because users' requests needed the room",
    "interrupted": "because the server was paused or reset",
    "failed": "because of an error, which the server's log has",
    "too_long": "because they are too long",
}


def report(counts: Sequence[GuardCounts], budget: float) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        counts: What the guard counted, by model.
        budget: The largest share of tokens that may change, more than 0 and less than 1.
    """
    return {"max_token_change": budget, "models": [_of_model(of_model, budget) for of_model in counts]}


def _of_model(counts: GuardCounts, budget: float) -> dict[str, Any]:
    answers = [_of_answers(of_task, budget) for of_task in counts.answers]
    return {
        "model": counts.model,
        "requests": counts.requests,
        "read_again": sum(of_task.requests for of_task in counts.answers),
        "left_out": dict(counts.left_out),
        "answers": answers,
        "advice": advice(answers, counts.has_gates, sum(counts.left_out.values())),
    }


def _of_answers(answers: Answers, budget: float) -> dict[str, Any]:
    changed, greedy = answers.changed_tokens, answers.greedy_tokens
    judged = verdict(changed, greedy, budget)
    mean = answers.difference / answers.compared_tokens if answers.compared_tokens else None
    return {
        "task": answers.task,
        "layer": answers.layer,
        "read_again": answers.requests,
        "tokens": answers.tokens,
        "greedy_tokens": greedy,
        "changed_tokens": changed,
        "token_change": changed / greedy if greedy else None,
        "interval": wilson_interval(changed, greedy) if greedy else None,
        "compared_tokens": answers.compared_tokens,
        "mean_difference": mean if mean is not None and isfinite(mean) else None,
        "verdict": judged,
        "more_greedy_tokens": more_tokens(changed, greedy, budget) if judged == UNCLEAR else None,
    }


def describe(result: dict[str, Any]) -> str:
    """The result as text of one screen.

    Args:
        result: What `report` returns.
    """
    if not result["models"]:
        return "No request has arrived at this server yet."
    return "\n\n".join("\n".join(_block(model, result["max_token_change"])) for model in result["models"])


def _block(model: dict[str, Any], budget: float) -> list[str]:
    lines = [plain(model["model"])]
    if model["answers"]:
        lines += [*_table([HEADER, *map(_cells, model["answers"])]), ""]
        lines += [
            f"At most {100 * budget:.4g}% of greedy tokens may change (--max-token-change). Nats apart: how "
            "far withdrawal moves",
            "the log-probability of an answer's token, on average.",
        ]
    left_out = {reason: number for reason, number in model["left_out"].items() if number}
    reasons = ", ".join(f"{left_out[name]:,} {REASONS.get(name, plain(name))}" for name in sorted(left_out))
    return [
        *lines,
        f"Requests: {model['requests']:,} in all, {model['read_again']:,} read again.",
        f"Left out: {sum(left_out.values()):,}{f' ({reasons})' if reasons else ''}.",
        model["advice"],
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    changed, judged = "-", row["verdict"]
    if row["interval"]:
        least, most = row["interval"]
        changed = f"{row['token_change']:.2%} ({least:.2%} to {most:.2%})"
    if row["more_greedy_tokens"]:
        judged += f": about {_rounded(row['more_greedy_tokens']):,} more greedy tokens would tell"
    return (
        plain(row["task"]) or "-",
        str(row["layer"]),
        f"{row['read_again']:,}",
        f"{row['greedy_tokens']:,}",
        changed,
        "-" if row["mean_difference"] is None else f"{row['mean_difference']:.3g}",
        judged,
    )


def _rounded(number: int) -> int:
    """A number rounded up to two digits and zeros."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(HEADER, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
