# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The report of `vtw gsearch` and `vtw psigmoid`, which compares the schedule with other methods."""

from collections.abc import Collection
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import MARKERS, Draw, label_layers, page

PLAIN = ("random, ", "uniform, ", "resolution, ")
"""What the names of plain baselines begin with."""
NAMES = {"gsearch": "G-Search", "psigmoid": "P-Sigmoid"}


def html(result: dict[str, Any], command: str | None) -> str:
    """Renders the report of a search to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the schedule. None if there is none.
    """
    winner = plain_winner(result)
    given = {"result": result, "command": command, "names": NAMES, "layers": stages, "winner": winner}
    return page("schedules.html", _plots(result), **given)


def stages(policy: dict[str, Any]) -> str:
    """The fractions of visual tokens that a policy's stages keep, and what they are ranked by, in words.

    Args:
        policy: An item of `policies` in `result.json`.
    """
    if "visual_tokens" in policy:
        return f"all, but there are {policy['visual_tokens']:.3g} as many"
    kept = ", ".join(f"{stage['keep']:.3g} from layer {stage['layer']} on" for stage in policy["stages"])
    return f"{kept} ({policy['ranking']})" if policy["ranking"] else kept or "all"


def plain_winner(result: dict[str, Any]) -> str | None:
    """A sentence about the best plain baseline, if it changes answers less than the schedule that was found.

    Args:
        result: The content of `result.json`.

    Returns:
        None if no plain baseline does.
    """
    method, policies = result["method"], result["policies"]
    changed = {name: _worst(policy["curves"].values(), "token_change") for name, policy in policies.items()}
    plain = [name for name in policies if name.startswith(PLAIN)]
    best = min(plain, key=lambda name: changed[name], default=method)
    if changed[best] >= changed[method]:
        return None
    return (
        f"On this data, a plain baseline is better than {NAMES[method]} at no more "
        f"{result['others_take_no_more']}: {best} changes {changed[best]:.1%} of tokens on the worst task, "
        f"and {NAMES[method]} {changed[method]:.1%}."
    )


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
    tasks = list(next(iter(result["policies"].values()))["curves"])
    width = max(len(NAMES.get(name, name)) for name in result["policies"])
    heads = [f"{head:>6}" for head in ("work", "KV", *tasks, "answers", "KL")]
    lines = [
        f"{result['made']['samples']} samples, {result['model']['num_hidden_layers']} layers.",
        "work, KV: the decoder's prefill work and the KV memory, in percent of stock vLLM's",
        "by task: tokens of the full model's answers that change, in percent",
        "answers: answers in which a token changes, in percent, on the worst task",
        "KL: mean KL(full || schedule) of a token, in nats, on the worst task",
        "",
        "  ".join([" " * width, *heads]),
    ]
    for name, policy in result["policies"].items():
        values = [policy["prefill_flops_share"], policy["kv_share"]]
        values += [policy["curves"][task]["token_change"] for task in tasks]
        curves = policy["curves"].values()
        values.append(_worst(curves, "answer_change"))
        cells = [f"{100 * value:{len(head)}.1f}" for value, head in zip(values, heads, strict=False)]
        cells.append(f"{_worst(curves, 'mean_kl'):6.2g}")
        lines.append("  ".join([f"{NAMES.get(name, name):{width}}", *cells]))
    chosen, winner = result["policies"][result["method"]], plain_winner(result)
    return [
        *([winner, ""] if winner else []),
        *lines,
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
        axes.plot(range(num_layers), result["keeps"], "k.", label="found for the layer")
        for name, policy in policies.items():
            if "visual_tokens" in policy:
                continue
            axes.step(range(num_layers), fractions(policy), where="mid", label=NAMES.get(name, name))
        axes.set_ylabel("fraction of visual tokens")
        label_layers(axes, "layer, counted from 0")

    def against(share: str, label: str) -> Draw:
        def draw(axes: Axes) -> None:
            for marker, (name, policy) in zip(MARKERS, policies.items(), strict=False):
                changed = _worst(policy["curves"].values(), "token_change")
                axes.plot([100 * policy[share]], [100 * changed], marker, label=NAMES.get(name, name))
            axes.set_xlim(0, 100 * max(1, *(policy[share] for policy in policies.values())) + 5)
            axes.set_xlabel(label)
            axes.set_ylabel("tokens changed on the worst task (%)")

        return draw

    return {
        "Schedule": schedule,
        "Quality against work": against("prefill_flops_share", "decoder's prefill work (% of stock vLLM)"),
        "Quality against memory": against("kv_share", "KV memory (% of stock vLLM)"),
    }


def _worst(curves: Collection[dict[str, float]], name: str) -> float:
    """A value of `TaskDivergence`, on the task where it is largest."""
    return max(curve[name] for curve in curves)
