# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What reports say of a policy beside others that cost no more."""

from collections.abc import Collection, Mapping
from typing import Any

NO_RESOLUTION = (
    "No lower resolution of the pictures takes as little: the model makes too many tokens of them."
)
"""What reports say if they have no baseline of pictures at a lower resolution."""


def stages(policy: Mapping[str, Any]) -> str:
    """The fractions of visual tokens that a policy's stages keep, and what they are ranked by, in words.

    Args:
        policy: An item of `policies` in `result.json`.
    """
    if "visual_tokens" in policy:
        return f"all, but there are {policy['visual_tokens']:.3g} as many"
    kept = ", ".join(f"{stage['keep']:.3g} from layer {stage['layer']} on" for stage in policy["stages"])
    return f"{kept} ({policy['ranking']})" if policy["ranking"] else kept or "all"


def worst(curves: Collection[Mapping[str, float]], name: str) -> float:
    """A value of `TaskDivergence`, on the task where it is largest."""
    return max(curve[name] for curve in curves)


def plain_winner(result: Mapping[str, Any], shown: str, cost: str) -> str | None:
    """A sentence about the best plain baseline, if it changes answers less than the policy that was found.

    Args:
        result: The content of `result.json`. The first one of its `policies` was found.
        shown: Its name in reports.
        cost: The cost of which others take no more, in words.

    Returns:
        None if no plain baseline does.
    """
    policies = result["policies"]
    changed = {name: worst(policy["curves"].values(), "token_change") for name, policy in policies.items()}
    found = next(iter(policies))
    plain = [name for name, policy in policies.items() if policy["plain"]]
    best = min(plain, key=lambda name: changed[name], default=found)
    if changed[best] >= changed[found]:
        return None

    def on_worst_task(name: str) -> str:
        curves = policies[name]["curves"]
        task = max(curves, key=lambda task: curves[task]["token_change"])
        tokens = result["tasks"][task]["tokens"]
        return f"{changed[name]:.1%} of {tokens} answer tokens on its worst task, {task}"

    return (
        f"On this data, a plain baseline changes answers less than {shown} at no more {cost}: "
        f'"{best}" changes {on_worst_task(best)}, and {shown} {on_worst_task(found)}.'
    )


def policy_table(policies: Mapping[str, Mapping[str, Any]], shown: Mapping[str, str]) -> list[str]:
    """The lines of a table that shows policies side by side.

    Args:
        policies: The `policies` of `result.json`.
        shown: By the names of policies, other names to show.
    """
    tasks = list(next(iter(policies.values()))["curves"])
    width = max(len(shown.get(name, name)) for name in policies)
    heads = [f"{head:>6}" for head in ("work", "KV", *tasks, "answers", "KL")]
    lines = [
        "work, KV: the decoder's prefill work and the KV memory, in percent of stock vLLM's",
        "by task: tokens of the full model's answers that change, in percent",
        "answers: answers in which a token changes, in percent, on the worst task",
        "KL: mean KL(full || policy) of a token, in nats, on the worst task",
        "",
        "  ".join([" " * width, *heads]),
    ]
    for name, policy in policies.items():
        values = [policy["prefill_flops_share"], policy["kv_share"]]
        values += [policy["curves"][task]["token_change"] for task in tasks]
        curves = policy["curves"].values()
        values.append(worst(curves, "answer_change"))
        cells = [f"{100 * value:{len(head)}.1f}" for value, head in zip(values, heads, strict=False)]
        cells.append(f"{worst(curves, 'mean_kl'):6.2g}")
        lines.append("  ".join([f"{shown.get(name, name):{width}}", *cells]))
    if not any("visual_tokens" in policy for policy in policies.values()):
        lines += ["", NO_RESOLUTION]
    return lines
