"""G-Search: the fewest visual tokens that each layer needs, found from shallow to deep.

Before each layer the visual tokens that its predecessor attended to least leave for good, as many as answers
allow, with those of shallower layers gone already. *Ours*: attention is that of the prompt's last token, what
answers allow is the answer criterion (`criteria`), and the least fraction is found by bisection on a grid,
every deeper layer getting the same.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from tqdm import tqdm

from vllm_vtw.policy import Policy
from vllm_vtw.search.divergence import Curve
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.samples import SampleAtLayer, divergence_by_task
from vllm_vtw.search.schedules.schedule import GRID, at_borders, merged, of_policy

Within = Callable[[Mapping[str, Curve]], bool]


def g_search(
    model: HFModel,
    asked: Sequence[SampleAtLayer],
    within: Within,
    borders: Collection[int],
    found: Sequence[float] = (),
) -> Iterator[float]:
    """The fraction that each layer gets, from the first on.

    Args:
        model: The model.
        asked: Samples, before layer 0.
        within: Whether answers may differ so much, by task.
        borders: Layers before which tokens may leave.
        found: Of the first layers, where a search was interrupted.

    Yields:
        The fractions of the layers that `found` does not have.
    """
    num_layers, before = len(model.decoder.layers), 1.0
    for layer in range(num_layers):

        def suffices(parts: int, layer: int = layer, asked: Sequence[SampleAtLayer] = asked) -> bool:
            return within(divergence_by_task(model, asked, layer, [parts / GRID] * (num_layers - layer)))

        if layer < len(found):
            keep = found[layer]
        else:
            keep = least(round(before * GRID), suffices) / GRID if layer in borders else before
            yield keep
        asked = [one.going_on(model, layer, [keep]) for one in asked]
        before = keep


def least(most: int, suffices: Callable[[int], bool]) -> int:
    """The least number that suffices, where `most` is known to, and all above one that does."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return high


def staged(
    model: HFModel,
    asked: Sequence[SampleAtLayer],
    within: Within,
    keeps: Sequence[float],
    max_stages: int,
    price: Price,
) -> Policy:
    """The stages of a schedule, as `merged` begins them, that answers allow.

    What they keep is searched again: tokens that fewer layers chose are others, so that it may take more of
    them, or fewer. Where the merged fractions do as well, the cheaper ones are taken.
    """
    first = merged(keeps, max_stages, price)
    num_layers = len(keeps)
    borders = {stage.layer for stage in first.stages}
    layers = tqdm(
        g_search(model, asked, within, borders), total=num_layers, unit="layer", desc="searching stages"
    )
    again = at_borders(list(layers), range(num_layers))
    if price.cost(first) < price.cost(again) and within(
        divergence_by_task(model, asked, 0, of_policy(first, num_layers))
    ):
        return first
    return again
