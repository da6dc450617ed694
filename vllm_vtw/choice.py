# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a request may choose: the layer at which its visual tokens leave, or the share of them that stays.

A request names it in `vllm_xargs` of the OpenAI API, or in `SamplingParams(extra_args=...)`.
"""

from typing import Any, NamedTuple

from vllm_vtw.policy import Policy, one_of
from vllm_vtw.untrusted_files import shorten

LAYER, TASK, KEEP = KEYS = "vtw_layer", "vtw_task", "vtw_keep"
"""The keys that a request may have."""
PREFIX = "vtw_"
"""Other keys that begin with it are refused, because they are misspelled."""


class Choice(NamedTuple):
    """What a request chose.

    Attributes:
        layer: The layer at which its visual tokens leave, or the number of layers if they stay. None if the
            request leaves it to the policy.
        task: The name of its task. Empty if it has none.
        keep: The share of its visual tokens that stays where the policy keeps some, or 1 if all do. None if
            the request leaves it to the policy.
    """

    layer: int | None = None
    task: str = ""
    keep: float | None = None


def choice_of(policy: Policy, num_hidden_layers: int, sampling_params: Any) -> Choice:
    """What a request chose.

    Args:
        policy: The policy that is being served.
        num_hidden_layers: The number of decoder layers.
        sampling_params: The request's `SamplingParams`. None for a pooling request.

    Raises:
        ValueError: The request chose a layer, task or share that the policy does not offer. The message names
            those that it does.
    """
    given = getattr(sampling_params, "extra_args", None) or {}
    unknown = [key for key in given if key.startswith(PREFIX) and key not in KEYS]
    if unknown:
        raise ValueError(
            f"{shorten(unknown[0])}: unknown; a request may have {LAYER!r}, {TASK!r} or {KEEP!r}"
        )
    chosen = [key for key in KEYS if key in given]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]!r} and {chosen[1]!r} both choose what is withdrawn: send one of them")
    if KEEP in given:
        return Choice(keep=_checked_keep(policy, given[KEEP]))
    if LAYER in given:
        layer, offered = given[LAYER], policy.offered_layers(num_hidden_layers)
        if type(layer) is not int or layer not in offered:
            kind = "" if type(layer) is int else "has to be an integer; "
            raise ValueError(f"{LAYER!r} = {shorten(layer)}: {kind}this server offers {one_of(offered)}")
        return Choice(layer)
    if TASK not in given:
        return Choice()
    task = given[TASK]
    if not isinstance(task, str) or task not in policy.tasks:
        has = (
            f"has {', '.join(policy.tasks)}" if policy.tasks else f"has no tasks: send {LAYER!r}, or nothing"
        )
        raise ValueError(f"{TASK!r} = {shorten(task)}: this server's policy {has}")
    return Choice(policy.tasks[task], task)


def _checked_keep(policy: Policy, keep: Any) -> float:
    if not policy.offered_keeps:
        raise ValueError(
            f"{KEEP!r} = {shorten(keep)}: this server's policy offers no shares: send no {KEEP!r}"
        )
    if type(keep) not in (int, float) or keep not in (*policy.offered_keeps, 1):
        kind = "" if type(keep) in (int, float) else "has to be a number; "
        offered = ", ".join(f"{share:g}" for share in policy.offered_keeps)
        layer = next(stage.layer for stage in policy.stages if stage.keep)
        raise ValueError(
            f"{KEEP!r} = {shorten(keep)}: {kind}this server offers {offered}, 1 (no visual token leaves at "
            f"layer {layer})"
        )
    return float(keep)
