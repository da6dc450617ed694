# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The notes that every report has about the data of a search."""

from collections.abc import Collection
from math import ceil
from typing import Any


def data_notes(
    result: dict[str, Any], most: float | None, tasks_without_sample: Collection[str]
) -> list[str]:
    """Returns notes on what the data or the model limits, whatever was searched.

    Args:
        result: The result of a search, with `tasks`, `made` and `model`.
        most: The share of tokens that was allowed to change, from 0 to 1. None if there was no such budget.
        tasks_without_sample: The tasks of which no good sample was drawn.
    """
    said = []
    # The rule of three: if none of n tokens changed, the true share is below 3 / n with a confidence of 95%.
    few = [
        f"{task} ({n['tokens']})" for task, n in result["tasks"].items() if most and most * n["tokens"] < 3
    ]
    if most and few:
        said.append(
            f"Too few answer tokens to tell {100 * most:g}% changed tokens from none, which takes "
            f"{ceil(3 / most)} tokens: {', '.join(few)}. A larger --limit adds samples, if the data has more."
        )
    if tasks_without_sample:
        said.append(
            f"No good sample was drawn of these tasks: {', '.join(sorted(tasks_without_sample))}. "
            "The reasons for bad samples are listed. A larger --limit draws more, if the data has more."
        )
    cut = [f"{task} ({n['cut']} of {n['samples']})" for task, n in result["tasks"].items() if n["cut"]]
    if cut:
        said.append(f"Answers cut at --max-tokens {result['made']['max_tokens']}: {', '.join(cut)}.")
    return said
