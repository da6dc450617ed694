# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What to do about what a server's guard found."""

from collections.abc import Sequence
from typing import Any

from vllm_vtw.commands.metrics_page import plain
from vllm_vtw.commands.token_change import FINE, NO_GREEDY_ANSWERS, TOO_SHALLOW

MOST_NAMED = 5
"""The largest number of tasks that a sentence names."""


def advice(answers: Sequence[dict[str, Any]], has_gates: bool, left_out: float) -> str:
    """One sentence that says what to do.

    Args:
        answers: The rows of the table, as `--json` prints them.
        has_gates: Whether gates decide at which layer visual tokens leave.
        left_out: The number of requests that were chosen and not read again.
    """
    verdicts = {row["verdict"] for row in answers}
    if not answers:
        why = "the guard reads only while users leave it room" if left_out else "wait for more requests"
        return f"No answer has been read again yet: {why}."
    if TOO_SHALLOW in verdicts:
        return _remedy(answers, has_gates)
    if verdicts == {FINE}:
        return "Visual tokens leave late enough for what is asked here."
    if verdicts == {NO_GREEDY_ANSWERS}:
        return "Only greedy answers can be judged: send some requests with temperature 0."
    if verdicts == {FINE, NO_GREEDY_ANSWERS}:
        return "Nothing is too shallow, but only greedy answers can be judged: send some with temperature 0."
    return "Nothing is too shallow so far: leave the guard on until the other rows have enough greedy tokens."


def _remedy(answers: Sequence[dict[str, Any]], has_gates: bool) -> str:
    shallow = [row for row in answers if row["verdict"] == TOO_SHALLOW]
    # A task has a layer of its own, whatever else the policy says.
    if any(row["task"] for row in shallow):
        tasks = list(dict.fromkeys(row["task"] for row in shallow))
        named = [f"task {plain(task)}" if task else "requests without a task" for task in tasks[:MOST_NAMED]]
        if len(tasks) > MOST_NAMED:
            named.append(f"{len(tasks) - MOST_NAMED} more")
        return (
            f"Use a larger K for {_listed(named)}: `vtw calibrate MODEL --data FILE --per-task` finds one "
            "for each task, on samples like these requests."
        )
    layers = _listed([str(row["layer"]) for row in shallow])
    if has_gates:
        return (
            f"Raise the thresholds of the policy's gates: at layer {layers}, visual tokens leave too early."
        )
    if not any(row["compared_tokens"] for row in shallow):
        return (
            "Search another schedule on samples like these requests, with smaller budgets: "
            "`vtw gsearch MODEL --data FILE`."
        )
    return (
        f"Use a larger K than {layers}: `vtw calibrate MODEL --data FILE` finds one on samples like these "
        "requests, and with --per-task one for each task that requests may name."
    )


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
