"""What gates decide about samples at a threshold, and what comes of it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vtw.capacity import Groups
from vllm_vtw.policy import Policy
from vllm_vtw.search.dyvte.exits import Exits
from vllm_vtw.search.price import Price


def exit_stages(margins: npt.NDArray[np.float32], thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """The first stage without visual tokens, for each sample; the number of stages where they stay.

    Args:
        margins: By how much each gate says "leave", shape `(samples, gates)`.
        thresholds: Of each gate.
    """
    leaves = np.concatenate([margins > np.asarray(thresholds), np.ones((len(margins), 1), dtype=bool)], 1)
    return leaves.argmax(1) + 1


def kv_share(policy: Policy, price: Price, exit_stage: int) -> float:
    """Of stock's KV memory for a request that leaves at a stage, padding of KV-cache groups included."""
    groups = Groups.of(policy, price.num_layers)
    held = sum(price.layer_held(float(stage < exit_stage)) for stage in groups.stages)
    return groups.width * held / (price.num_layers * price.layer_held(1))


def evaluated(
    seen: Sequence[Exits],
    margins: npt.NDArray[np.float32],
    policy: Policy,
    price: Callable[[Exits], Price],
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
    layers = [*(stage.layer for stage in policy.stages), num_layers]
    stages = len(layers)
    ways = {"full model": np.full(len(seen), stages)}
    ways |= {f"VTW, K = {layers[stage - 1]}": np.full(len(seen), stage) for stage in range(1, stages)}
    assert policy.gate is not None
    ways["gates of the policy"] = exit_stages(margins, policy.gate.thresholds)
    ways |= {f"gates, t = {t:g}": exit_stages(margins, [t] * (stages - 1)) for t in thresholds}
    prices = [price(one) for one in seen]
    tasks = sorted({one.task for one in seen})

    def row(way: str, exits: npt.NDArray[np.int64]) -> dict[str, Any]:
        fixed = not way.startswith("gates")
        work, memory = [], []
        for of_one, stage in zip(prices, exits, strict=True):
            withdrawn = Policy.withdraw_at(layers[stage - 1], num_layers)
            work.append(of_one.flops_share(withdrawn))
            # VTW at one layer has two stages, whose groups need not be those of gates at several.
            memory.append(of_one.kv_share(withdrawn) if fixed else kv_share(policy, of_one, int(stage)))
        chosen = [one.answers[stage - 1] for one, stage in zip(seen, exits, strict=True)]

        def of(samples: list[int]) -> dict[str, Any]:
            known = [at for at in samples if seen[at].expected is not None]
            right = [chosen[at] == seen[at].expected for at in known]
            return {
                "accuracy": float(np.mean(right)) if known else None,
                "same_answer": float(np.mean([chosen[at] == seen[at].answers[-1] for at in samples])),
                "exit_layer": float(np.mean([layers[exits[at] - 1] for at in samples])),
                "prefill_flops_share": float(np.mean([work[at] for at in samples])),
                "kv_share": float(np.mean([memory[at] for at in samples])),
            }

        everything = list(range(len(seen)))
        by_task = {task: of([at for at in everything if seen[at].task == task]) for task in tasks}
        return {"way": way, "all": of(everything), "tasks": by_task}

    return [row(way, exits) for way, exits in ways.items()]
