"""A calibration's result for people: a table, and what to know beside it."""

from collections.abc import Collection, Iterable, Sequence
from math import ceil
from typing import Any

from vllm_vtw.config import SERVED_MODEL_TYPES
from vllm_vtw.search.vtw.criteria import FIRST_LAYER


def notes(result: dict[str, Any], criterion: str, unseen: Collection[str]) -> list[str]:
    """What a reader has to know beside the numbers; `unseen` are tasks without a good sample."""
    said = []
    layers, layer, most = result["layers"], result["layer"][criterion], result["budget"]["max_token_change"]
    if layer is None:
        said.append(
            f"No K that was looked at satisfies the {criterion} criterion, so there is no policy file: "
            "look at other --layers, allow more, or serve without withdrawal."
        )
        if criterion == "first-token":
            deepest = [
                f"{result['first_token_kl'][-1]:.2g} nats, where {result['budget']['eta']:g} are allowed"
            ]
        else:
            deepest = [
                f"{task} {curve['token_change'][-1]:.2%} of the tokens and {curve['mean_kl'][-1]:.2g} nats"
                for task, curve in result["curves"].items()
            ]
        said.append(f"What is left at K = {layers[-1]}: {', '.join(deepest)}.")
    elif result["kv_share"][layers.index(layer)] >= 1:
        said.append(
            f"At K = {layer} the padding of vLLM's KV-cache groups takes more memory than withdrawal saves: "
            "allow more, or serve without withdrawal."
        )
    said += of_data(result, most, unseen)
    published = [layer for layer in layers if layer >= FIRST_LAYER]
    if not published or published != list(range(FIRST_LAYER, published[-1] + 1)):
        looked_at = ", ".join(map(str, published)) or "none"
        said.append(
            f"As published, the first-token criterion looks at every K from {FIRST_LAYER} on; "
            f"here it looked at {looked_at}."
        )
    return said


def of_data(result: dict[str, Any], most: float | None, unseen: Collection[str]) -> list[str]:
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


def table(result: dict[str, Any]) -> list[str]:
    """Both criteria side by side, in lines."""
    layers, tokens = result["layers"], sum(count["tokens"] for count in result["tasks"].values())

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:34}" + "".join(f"{value:>14}" for value in values)

    def shares(name: str, values: Sequence[float]) -> str:
        at = [None if layer is None else layers.index(layer) for layer in result["layer"].values()]
        return row(name, ("" if index is None else f"{values[index]:.1%}" for index in at))

    lines = [
        f"{result['made']['samples']} samples, {tokens} tokens of answers",
        "",
        row("criterion", result["layer"]),
        row(
            f"K, of {result['model']['num_hidden_layers']} layers",
            ("none" if layer is None else str(layer) for layer in result["layer"].values()),
        ),
        shares("KV memory, of stock vLLM's", result["kv_share"]),
        shares("decoder's work in prefill", result["prefill_flops_share"]),
    ]
    for task, curve in result["curves"].items():
        lines.append(shares(f"{task}: tokens changed", curve["token_change"]))
        lines.append(shares(f"{task}: answers changed", curve["answer_change"]))
    return lines
