"""What every report says about the data that a search looked at."""

from collections.abc import Collection
from math import ceil
from typing import Any

from vllm_vtw.config import SERVED_MODEL_TYPES


def data_notes(result: dict[str, Any], most: float | None, unseen: Collection[str]) -> list[str]:
    """What a search's result does not say for its data, whatever was searched.

    Args:
        result: With `tasks`, `made` and `model`.
        most: The share of tokens that might change, where that was a budget.
        unseen: Tasks without a good sample.
    """
    said = []
    # No change in n tokens leaves a share of 3/n possible, at 95%.
    few = [
        f"{task} ({n['tokens']})" for task, n in result["tasks"].items() if most and most * n["tokens"] < 3
    ]
    if most and few:
        said.append(
            f"Too few tokens of answers to tell {100 * most:g}% changed from none, which takes "
            f"{ceil(3 / most)}: {', '.join(few)}. A larger --limit adds samples, where the data has more."
        )
    if unseen:
        said.append(f"No good sample was drawn of: {', '.join(sorted(unseen))}. A larger --limit draws more.")
    cut = [f"{task} ({n['cut']} of {n['samples']})" for task, n in result["tasks"].items() if n["cut"]]
    if cut:
        said.append(f"Answers cut at --max-tokens {result['made']['max_tokens']}: {', '.join(cut)}.")
    if result["model"]["model_type"] not in SERVED_MODEL_TYPES:
        said.append(f"This version of --model-impl vtw does not serve {result['model']['model_type']} yet.")
    return said
