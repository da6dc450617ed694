# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""G-Search (arXiv 2412.00556): the fewest visual tokens that each layer needs, from shallow to deep.

Before each layer, the visual tokens that are ranked lowest are withdrawn, as many as the answers allow.
Tokens that were withdrawn before shallower layers are already gone.

Three details are this project's own choice, not the paper's. Tokens are ranked by the attention that the
prompt's last token pays to them in the layer before, or by any other ranking. The answers allow what is
within the budgets of the answer criterion (`vllm_vtw.search.vtw.criteria`). The least fraction is found by
bisection on a grid, while all deeper layers get the same fraction as the layer in question.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from tqdm import tqdm

from vllm_vtw.policy import Policy
from vllm_vtw.search.divergence import TaskDivergence
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer, divergence_by_task
from vllm_vtw.search.schedules.schedule import GRID, keeps_by_layer, merge_stages, policy_at_borders

Within = Callable[[Mapping[str, TaskDivergence]], bool]
"""Whether changes of the answers, by task, are within budget."""


def g_search(
    model: HFModel,
    samples: Sequence[SampleAtLayer],
    within: Within,
    borders: Collection[int],
    found: Sequence[float] = (),
) -> Iterator[float]:
    """Searches the least fraction of visual tokens that each layer needs, from the first layer on.

    Args:
        model: The model.
        samples: The samples, before layer 0.
        within: Whether the changes of the answers are within budget.
        borders: The layers before which tokens may be withdrawn. Other layers get the fraction of the layer
            before.
        found: The fractions of the first layers that an interrupted search found.

    Yields:
        The fraction of each layer that is not in `found`.
    """
    num_layers, before = len(model.decoder.layers), 1.0
    for layer in range(num_layers):

        def suffices(parts: int, layer: int = layer, samples: Sequence[SampleAtLayer] = samples) -> bool:
            return within(divergence_by_task(model, samples, layer, [parts / GRID] * (num_layers - layer)))

        if layer < len(found):
            keep = found[layer]
        else:
            # A policy may not withdraw everything before the decoder.
            keep = least_sufficient(round(before * GRID), suffices) / GRID if layer in borders else before
            keep = max(keep, 1 / GRID) if layer == 0 else keep
            yield keep
        samples = [sample.run_layers(model, layer, [keep]) for sample in samples]
        before = keep


def least_sufficient(most: int, suffices: Callable[[int], bool]) -> int:
    """Finds the least number from 0 to `most` that suffices, by bisection.

    Args:
        most: A number that is known to suffice.
        suffices: Whether a number suffices. If one does, all larger ones have to suffice as well.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return high


def search_stages(
    model: HFModel,
    samples: Sequence[SampleAtLayer],
    within: Within,
    keeps: Sequence[float],
    max_stages: int,
    price: Price,
) -> Policy:
    """Makes a schedule's fractions into a policy of few stages that is within budget.

    `merge_stages` decides where the stages begin. Their fractions are searched again with withdrawal at these
    layers only: tokens are then ranked fewer times, so other tokens stay, and more or fewer of them may be
    needed. If the fractions of `merge_stages` are within budget too and cost less, they are used.

    Args:
        model: The model.
        samples: The samples, before layer 0.
        within: Whether the changes of the answers are within budget.
        keeps: The fraction that `g_search` found for each layer.
        max_stages: The largest number of stages, stage 0 included.
        price: Computes the cost of policies.
    """
    first = merge_stages(keeps, max_stages, price)
    num_layers = len(keeps)
    borders = {stage.layer for stage in first.stages}
    layers = tqdm(
        g_search(model, samples, within, borders), total=num_layers, unit="layer", desc="searching stages"
    )
    again = policy_at_borders(list(layers), range(num_layers))
    if price.cost(first) < price.cost(again) and within(
        divergence_by_task(model, samples, 0, keeps_by_layer(first, num_layers))
    ):
        return first
    return again
