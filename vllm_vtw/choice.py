# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a request may choose: the layer at which its visual tokens leave, by number or by the name of a task.

A request names it in `vllm_xargs` of the OpenAI API, or in `SamplingParams(extra_args=...)`.
"""

from typing import Any, NamedTuple

from vllm_vtw.policy import Policy, one_of
from vllm_vtw.untrusted_files import shorten

LAYER, TASK = KEYS = "vtw_layer", "vtw_task"
"""The keys that a request may have."""
PREFIX = "vtw_"
"""Other keys that begin with it are refused, because they are misspelled."""


class Choice(NamedTuple):
    """What a request chose.

    Attributes:
        layer: The layer at which its visual tokens leave, or the number of layers if they stay. None if the
            request leaves it to the policy.
        task: The name of its task. Empty if it has none.
    """

    layer: int | None = None
    task: str = ""


def choice_of(policy: Policy, num_hidden_layers: int, sampling_params: Any) -> Choice:
    """What a request chose.

    Args:
        policy: The policy that is being served.
        num_hidden_layers: The number of decoder layers.
        sampling_params: The request's `SamplingParams`. None for a pooling request.

    Raises:
        ValueError: The request chose a layer or task that the policy does not offer. The message names those
            that it does.
    """
    given = getattr(sampling_params, "extra_args", None) or {}
    unknown = [key for key in given if key.startswith(PREFIX) and key not in KEYS]
    if unknown:
        raise ValueError(f"{shorten(unknown[0])}: unknown; a request may have {LAYER!r} or {TASK!r}")
    if LAYER in given and TASK in given:
        raise ValueError(f"{LAYER!r} and {TASK!r} both choose a layer: send one of them")
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
        has = f"has {', '.join(policy.tasks)}" if policy.tasks else "has no tasks"
        raise ValueError(f"{TASK!r} = {shorten(task)}: this server's policy {has}")
    return Choice(policy.tasks[task], task)
