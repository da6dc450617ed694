# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Rankings by features: which tokens of images stay, as far as the scheduler has been told.

The encoder computes an image before any step computes the image's own tokens. A worker then orders these and
tells the scheduler. From there on, the request is like any other whose retention is known.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_vtw.choice import Choice
from vllm_vtw.config import ORDERS, WANTED
from vllm_vtw.retention import VISUAL, ImageKey, Orders, image_key

Order = npt.NDArray[np.int32]
MAX_BYTES = 64 << 20
"""The size of the orders that are kept for later requests. Those of 50,000 images of LLaVA-1.5, of whose
tokens a quarter stays, take 51 MiB."""
ENTRY_BYTES = 512
"""The size of a key and of what holds an order."""


class AwaitingRequest(NamedTuple):
    """A request with images of which it is not known yet which tokens stay."""

    request: Request
    choice: Choice


class ImageOrders:
    """The orders of images that the scheduler knows, and the requests that wait for others.

    Attributes:
        known: The orders of images that later requests may be about.
        of_request: By request id, the orders of its images that the request's retention was made with. They
            stay the same for as long as the request lives.
        awaiting: By request id, the requests with images whose orders are not known.
    """

    def __init__(self) -> None:
        self.known: LRUCache[ImageKey, Order] = LRUCache(
            MAX_BYTES, getsizeof=lambda order: order.nbytes + ENTRY_BYTES
        )
        self.of_request: dict[str, dict[ImageKey, Order]] = {}
        self.awaiting: dict[str, AwaitingRequest] = {}
        self._asked: set[ImageKey] = set()
        """The images that workers have been asked about and have not answered."""
        self._outdated: set[ImageKey] = set()
        """Those of them whose features may be of other weights than those that are served now."""
        self._changed: set[str] = set()
        """Ids of requests that got orders which workers have not been told yet."""

    def admit(self, request: Request) -> None:
        """Looks up the orders of the images of a request that arrives."""
        self.of_request[request.request_id] = {
            key: order for key in keys_of(request) if (order := self.known.get(key)) is not None
        }

    def next_missing(self, request: Request) -> tuple[int, MultiModalFeatureSpec]:
        """The first image of a request whose order is not known, and its number among the request's items."""
        known = self.of_request[request.request_id]
        return next(
            (index, feature)
            for index, feature in enumerate(request.mm_features)
            if feature.modality in VISUAL and image_key(feature) not in known
        )

    def forget(self, request_id: str) -> None:
        """Forgets a request that has ended."""
        self.of_request.pop(request_id, None)
        self.awaiting.pop(request_id, None)
        self._changed.discard(request_id)

    def forget_images(self) -> None:
        """Forgets what later requests may be about, as the model may be about to get other weights."""
        self.known.clear()
        self._outdated |= self._asked

    def tell(self, output: SchedulerOutput, encoder_cache: EncoderCacheManager) -> None:
        """Adds to a step what workers have to know and to find out.

        Args:
            output: The step.
            encoder_cache: Says which images have been computed by the end of the step.
        """
        begun = {new.req_id for new in output.scheduled_new_reqs}
        begun |= output.scheduled_cached_reqs.resumed_req_ids
        told = (begun | self._changed) & output.num_scheduled_tokens.keys()
        self._changed -= told
        setattr(output, ORDERS, {request_id: self.of_request[request_id] for request_id in told})
        if not output.total_num_scheduled_tokens:
            return  # the workers will not run
        wanted = {
            key
            for request_id, (request, _) in self.awaiting.items()
            for key in keys_of(request)
            if request_id in encoder_cache.cached.get(key[0], ()) and key not in self.of_request[request_id]
        }
        wanted -= self._asked
        self._asked |= wanted
        setattr(output, WANTED, sorted(wanted))

    def take(self, wanted: Sequence[ImageKey], orders: Orders) -> Iterator[tuple[AwaitingRequest, bool]]:
        """Takes what workers have found out.

        Args:
            wanted: The images that they were asked about.
            orders: What they answered.

        Yields:
            The requests that waited for these images, and whether the workers have answered.
        """
        if not wanted:
            return
        self._asked -= set(wanted)
        self.known.update({key: order for key, order in orders.items() if key not in self._outdated})
        self._outdated -= set(wanted)
        for request_id, waiting in list(self.awaiting.items()):
            own = self.of_request[request_id]
            mine = set(keys_of(waiting.request)).intersection(wanted) - own.keys()
            if not mine:
                continue
            own.update({key: orders[key] for key in mine & orders.keys()})
            self._changed.add(request_id)
            yield waiting, mine <= orders.keys()


def keys_of(request: Request) -> list[ImageKey]:
    """The keys of a request's images and videos."""
    return [image_key(feature) for feature in request.mm_features if feature.modality in VISUAL]
