# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The report of `vtw gsearch` and `vtw psigmoid`, which compares the schedule with other methods."""

from collections.abc import Collection
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.comparison import NO_RESOLUTION, plain_winner, policy_table, stages, worst
from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import INK, MARKERS, Draw, Price, label_layers, page, price_of

NAMES = {"gsearch": "G-Search", "psigmoid": "P-Sigmoid"}


def html(result: dict[str, Any], command: str | None) -> str:
    """Renders the report of a search to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the schedule. None if there is none.
    """
    found, shown = result["policies"][result["method"]], NAMES[result["method"]]
    choice = f"{shown} withdraws nothing within this budget"
    price: Price = []
    if found["stages"]:
        choice = f"{shown} keeps these shares of visual tokens: {stages(found)}"
        price = price_of(found, found["curves"])
    given = {"command": command, "winner": _winner(result), "budget": _budget(result["made"])}
    compared = {"shown": NAMES, "kept": stages, "worst": worst, "no_resolution": NO_RESOLUTION}
    return page("schedules.html", result, choice, price, _plots(result), **given, **compared)


def _budget(made: dict[str, Any]) -> str:
    """The budgets that the search kept to, in words.

    Args:
        made: `made` of `result.json`.
    """
    if "max_answer_kl" in made:
        return (
            f"Budgets on every task: a mean KL of at most {made['max_answer_kl']:g} nats, and at most "
            f"{made['max_token_change']:.3g} of the tokens changed."
        )
    if made["kv_budget"] is not None:
        return f"Budget: {made['kv_budget']:g} of stock vLLM's KV memory."
    return f"Budget: {made['budget']:g} of the full decoder's work on a prompt."


def _winner(result: dict[str, Any]) -> str | None:
    """The sentence about a plain baseline that is better than what was found."""
    return plain_winner(result, NAMES[result["method"]], result["others_take_no_more"])


def notes(result: dict[str, Any], tasks_without_sample: Collection[str]) -> list[str]:
    """Returns what a reader has to know in addition to the numbers.

    Args:
        result: The content of `result.json`.
        tasks_without_sample: The tasks of which no good sample was drawn.
    """
    found, said = result["policies"][result["method"]], []
    if not found["stages"]:
        said.append(
            "Within this budget nothing can be withdrawn, so there is no policy file: "
            "raise --max-answer-kl or --max-token-change."
            if result["method"] == "gsearch"
            else "This budget allows all visual tokens, so there is no policy file: "
            "lower --budget or --kv-budget."
        )
    elif found["kv_share"] >= 1:
        remedy = (
            "raise --max-answer-kl or --max-token-change"
            if result["method"] == "gsearch"
            else "lower --budget, or limit memory with --kv-budget"
        )
        said.append(f"KV-cache groups waste at least as much memory as withdrawal saves: {remedy}.")
    return said + data_notes(result, result["made"].get("max_token_change"), tasks_without_sample)


def table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of a table that shows the schedules side by side."""
    chosen, winner = result["policies"][result["method"]], _winner(result)
    return [
        *([winner, ""] if winner else []),
        f"{result['made']['samples']} samples, {result['model']['num_hidden_layers']} layers.",
        _budget(result["made"]),
        *policy_table(result["policies"], NAMES),
        "",
        f"{NAMES[result['method']]} was searched on these samples; the others were not. They take no more "
        f"{result['others_take_no_more']} than it does, except FastV as published.",
        f"Visual tokens kept: {stages(chosen)} (layers are counted from 0).",
    ]


def _plots(result: dict[str, Any]) -> dict[str, Draw]:
    num_layers, policies = result["model"]["num_hidden_layers"], result["policies"]

    def fractions(policy: dict[str, Any]) -> list[float]:
        keeps = [1.0] * num_layers
        for stage in policy["stages"]:
            keeps[stage["layer"] :] = [stage["keep"]] * (num_layers - stage["layer"])
        return keeps

    def schedule(axes: Axes) -> None:
        axes.plot(range(num_layers), result["keeps"], ".", color=INK, label="found for the layer")
        for name, policy in policies.items():
            if "visual_tokens" in policy:
                continue
            axes.step(range(num_layers), fractions(policy), where="mid", label=NAMES.get(name, name))
        axes.set_ylabel("fraction of visual tokens")
        label_layers(axes, "layer, counted from 0")

    def against(share: str, label: str) -> Draw:
        def draw(axes: Axes) -> None:
            for marker, (name, policy) in zip(MARKERS, policies.items(), strict=False):
                changed = worst(policy["curves"].values(), "token_change")
                axes.plot([100 * policy[share]], [100 * changed], marker, label=NAMES.get(name, name))
            axes.set_xlim(0, 100 * max(1, *(policy[share] for policy in policies.values())) + 5)
            axes.set_xlabel(label)
            axes.set_ylabel("tokens changed\non the worst task (%)")

        return draw

    return {
        "Schedule": schedule,
        "Quality against work": against("prefill_flops_share", "decoder's prefill work (% of stock vLLM)"),
        "Quality against memory": against("kv_share", "KV memory (% of stock vLLM)"),
    }
