"""Other methods that take no more than a policy does, to be looked at beside it."""

from collections.abc import Callable

from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.schedules.schedule import GRID

FASTV_LAYER, FASTV_KEEP = 2, 0.5


def baselines(policy: Policy, num_layers: int, share: Callable[[Policy], float]) -> dict[str, Policy]:
    """By name: VTW (arXiv 2405.05803) and FastV (arXiv 2403.06764), which drops once, before layer 2.

    A method that cannot do with as little is left out. FastV as published drops half of the visual tokens,
    for what that costs.

    Args:
        policy: What they are beside.
        num_layers: Of the decoder.
        share: What they take no more of.
    """
    most = share(policy)
    vtw = [Policy.withdraw_at(layer, num_layers) for layer in range(1, num_layers)]
    fastv = [Policy((Stage(FASTV_LAYER, part / GRID),)) for part in range(1, GRID)]
    # Padding lets memory fall where more is kept: not the dearest, but what disturbs answers least.
    best = [one for method in (vtw, fastv) for one in [one for one in method if share(one) <= most][-1:]]
    published = Policy((Stage(FASTV_LAYER, FASTV_KEEP),))
    return {_named(one): one for one in best if one != published} | {
        f"FastV as published, {FASTV_KEEP:g}": published
    }


def _named(policy: Policy) -> str:
    (stage,) = policy.stages
    if stage.keep:
        return f"FastV, {stage.keep:.3g} from layer {stage.layer} on"
    return f"VTW, K = {stage.layer}"
