"""What gates decide about samples at a threshold, and what comes of it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.policy import Policy
from vllm_vtw.search.dyvte.exits import SampleExits
from vllm_vtw.search.price import Price


def exit_stages(margins: npt.NDArray[np.float32], thresholds: Sequence[float]) -> list[int | None]:
    """The first stage that runs without each sample's visual tokens. None where they stay.

    Args:
        margins: By how much each gate prefers "leave", shape `(samples, gates)`.
        thresholds: The threshold of each gate.
    """
    leaves = margins > np.asarray(thresholds)
    return [int(row.argmax()) + 1 if row.any() else None for row in leaves]


def kv_share(policy: Policy, price: Price, exit_stage: int | None) -> float:
    """The KV memory of a request with an exit, as a share of stock vLLM's.

    The padding of KV-cache groups is included.

    Args:
        policy: A policy with gates.
        price: Of the request.
        exit_stage: As in `exit_stages`.
    """
    groups = LayerGroups.of(policy, price.num_layers)
    keeps = [float(exit_stage is None or stage < exit_stage) for stage in groups.stages]
    held = sum(price.layer_held(keep) for keep in keeps)
    return groups.width * held / (price.num_layers * price.layer_held(1))


def evaluate_gates(
    seen: Sequence[SampleExits],
    margins: npt.NDArray[np.float32],
    policy: Policy,
    price: Callable[[SampleExits], Price],
    num_layers: int,
    thresholds: Sequence[float],
) -> list[dict[str, Any]]:
    """For the full model, each fixed layer, the policy and each threshold: accuracy, exits, prices, by task
    and of all samples.

    Args:
        seen: Samples with their answers.
        margins: Of each and each gate, shape `(samples, gates)`.
        policy: With gates.
        price: Of a sample.
        num_layers: Of the decoder.
        thresholds: For all gates alike.
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
        for of_one, stage, layer in zip(prices, exits, exit_layers, strict=True):
            withdrawn = Policy.withdraw_at(layer, num_layers)
            work.append(of_one.flops_share(withdrawn))
            # VTW at one layer has two stages, whose KV-cache groups need not be those of gates at several.
            memory.append(of_one.kv_share(withdrawn) if fixed else kv_share(policy, of_one, stage))
        chosen = [
            one.answers[-1 if stage is None else stage - 1] for one, stage in zip(seen, exits, strict=True)
        ]

        def of(samples: list[int]) -> dict[str, Any]:
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
        by_task = {task: of([at for at in everything if seen[at].task == task]) for task in tasks}
        return {"way": way, "all": of(everything), "tasks": by_task}

    return [row(way, exits) for way, exits in ways.items()]
