# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Other methods that cost no more than a policy, for comparison with it."""

from collections.abc import Callable

from vllm_vtw.policy import BY_QUESTION, Policy, Stage
from vllm_vtw.search.schedules.schedule import GRID

# FastV as published (arXiv 2403.06764): half of the visual tokens are dropped before layer 2.
FASTV_LAYER, FASTV_KEEP = 2, 0.5
PLAIN = ("random", "uniform")
"""Rankings that any other one should beat."""


def baselines(policy: Policy, layers: range, share: Callable[[Policy], float]) -> dict[str, Policy]:
    """Returns policies of published methods and plain rankings that cost no more than `policy`.

    These are VTW (arXiv 2405.05803), FastV (arXiv 2403.06764), and the rankings `random` and `uniform`. Of
    each, the policy is taken that withdraws least and still costs no more: VTW with the largest K, FastV with
    the largest fraction of visual tokens from layer 2 on, and the others with the largest fraction from layer
    0 on. A method that always costs more is left out. If the model needs all visual tokens in these layers,
    withdrawal begins at the first layer that allows it. If not, FastV as published, which drops half of the
    visual tokens, is there, too, whatever it costs.

    Args:
        policy: The policy that the others are compared with.
        layers: The layers at which withdrawal may begin, up to the last one.
        share: The cost of a policy that is compared, such as `Price.flops_share`.

    Returns:
        The policies by the names that reports show.
    """
    most = share(policy)
    fastv_layer = max(FASTV_LAYER, layers.start)
    methods = [[Policy.withdraw_at(layer, layers.stop) for layer in layers]]
    # Layer 1 is the first one that may get fewer visual tokens by what layer 0 made of them.
    plain_layer = layers.start if layers.start > 1 else 0
    for ranking, layer in ((BY_QUESTION[0], fastv_layer), *((name, plain_layer) for name in PLAIN)):
        methods.append([Policy((Stage(layer, part / GRID),), ranked_by=ranking) for part in range(1, GRID)])
    # The last policy that fits disturbs answers least. It need not cost most: KV-cache groups can
    # waste so much less memory that a policy that keeps more takes less.
    best = [last for method in methods for last in [one for one in method if share(one) <= most][-1:]]
    published = Policy((Stage(FASTV_LAYER, FASTV_KEEP),))
    found = {_name(one): one for one in best if one not in (published, policy)}
    if fastv_layer == FASTV_LAYER:
        found[f"FastV as published, {FASTV_KEEP:g}"] = published
    return found


def _name(policy: Policy) -> str:
    (stage,) = policy.stages
    if stage.keep:
        method = "FastV" if policy.ranking in BY_QUESTION else policy.ranking
        return f"{method}, {stage.keep:.3g} from layer {stage.layer} on"
    return f"VTW, K = {stage.layer}"
