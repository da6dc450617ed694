# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Evaluates gates: what they decide about samples at a threshold, and how that changes answers and cost."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vtw.policy import Policy
from vllm_vtw.search.dyvte.exit_labels import SampleExits
from vllm_vtw.search.price import Price


def exit_stages(margins: npt.NDArray[np.float32], thresholds: Sequence[float]) -> list[int | None]:
    """For each sample, the first stage that runs without its visual tokens. None if they stay.

    For example, if only the second of three gates exceeds its threshold, the exit stage is 2.

    Args:
        margins: Each gate's logit for "leave" less its logit for "stay", shape `(samples, gates)`.
        thresholds: The threshold of each gate.
    """
    leaves = margins > np.asarray(thresholds)
    return [int(row.argmax()) + 1 if row.any() else None for row in leaves]


def evaluate_gates(
    seen: Sequence[SampleExits],
    margins: npt.NDArray[np.float32],
    policy: Policy,
    price: Callable[[SampleExits], Price],
    num_layers: int,
    thresholds: Sequence[float],
) -> list[dict[str, Any]]:
    """Compares gates with the full model and with withdrawal at a fixed layer (VTW).

    Args:
        seen: The samples, with their answers for an exit at each of the policy's stages.
        margins: Each gate's logit for "leave" less its logit for "stay", shape `(samples, gates)`.
        policy: A policy with gates.
        price: Returns the `Price` for a sample.
        num_layers: The number of decoder layers.
        thresholds: The thresholds to evaluate. Each of them is used for all gates.

    Returns:
        Rows for JSON: the full model, VTW at each of the policy's layers, the gates at the policy's
        thresholds, and the gates at each of `thresholds`. A row has the means of all samples and those of
        each task.
    """
    layers = [stage.layer for stage in policy.stages]
    ways: dict[str, list[int | None]] = {"full model": [None] * len(seen)}
    for stage, layer in enumerate(layers, 1):
        ways[f"VTW, K = {layer}"] = [stage] * len(seen)
    assert policy.gate is not None
    ways["gates of the policy"] = exit_stages(margins, policy.gate.thresholds)
    ways |= {f"gates, t = {t:g}": exit_stages(margins, [t] * len(layers)) for t in thresholds}
    prices = [price(one) for one in seen]
    tasks = sorted({one.task for one in seen})

    def row(way: str, exits: list[int | None]) -> dict[str, Any]:
        fixed = not way.startswith("gates")
        exit_layers = [num_layers if stage is None else layers[stage - 1] for stage in exits]
        work, memory = [], []
        for sample_price, stage, layer in zip(prices, exits, exit_layers, strict=True):
            withdrawn = Policy.withdraw_at(layer, num_layers)
            work.append(sample_price.flops_share(withdrawn))
            # A policy with gates has the same KV-cache groups whatever they decide. VTW has only two stages,
            # whose groups can differ from these.
            memory.append(
                sample_price.kv_share(withdrawn) if fixed else sample_price.kv_share_at_exit(policy, stage)
            )
        chosen = [
            one.answers[-1 if stage is None else stage - 1] for one, stage in zip(seen, exits, strict=True)
        ]

        def means(samples: list[int]) -> dict[str, Any]:
            known = [at for at in samples if seen[at].expected is not None]
            right = [chosen[at] == seen[at].expected for at in known]
            return {
                "accuracy": float(np.mean(right)) if known else None,
                "same_answer": float(np.mean([chosen[at] == seen[at].answers[-1] for at in samples])),
                "exit_layer": float(np.mean([exit_layers[at] for at in samples])),
                "prefill_flops_share": float(np.mean([work[at] for at in samples])),
                "kv_share": float(np.mean([memory[at] for at in samples])),
            }

        everything = list(range(len(seen)))
        by_task = {task: means([at for at in everything if seen[at].task == task]) for task in tasks}
        return {"way": way, "all": means(everything), "tasks": by_task}

    return [row(way, exits) for way, exits in ways.items()]
