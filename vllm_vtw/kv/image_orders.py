# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Rankings by features: which tokens of images stay, as far as the scheduler has been told.

The encoder computes an image before any step computes the image's own tokens. A worker then orders these and
tells the scheduler. From there on, the request is like any other whose retention is known.
"""

from collections.abc import Iterator, Mapping
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
from vllm_vtw.retention import VISUAL

Order = npt.NDArray[np.int32]
MAX_BYTES = 64 << 20
"""The size of the orders that are kept for later requests. Those of 100,000 images of LLaVA-1.5, of whose
tokens a quarter stays, take 55 MiB."""


class AwaitingRequest(NamedTuple):
    """A request with images of which it is not known yet which tokens stay."""

    request: Request
    choice: Choice


def visual(request: Request) -> list[MultiModalFeatureSpec]:
    """The images and videos of a request."""
    return [feature for feature in request.mm_features if feature.modality in VISUAL]


class ImageOrders:
    """The orders of images that the scheduler knows, and the requests that wait for others.

    Attributes:
        known: By the identifier of an image, those of its tokens that may stay, as `FeatureRanking.order`
            returned them.
        of_request: By request id, the orders of its images that the request's retention was made with. They
            stay the same for as long as the request lives.
        awaiting: By request id, the requests with images whose orders are not known.
    """

    def __init__(self) -> None:
        self.known: LRUCache[str, Order] = LRUCache(MAX_BYTES, getsizeof=lambda order: order.nbytes)
        self.of_request: dict[str, dict[str, Order]] = {}
        self.awaiting: dict[str, AwaitingRequest] = {}
        self._asked: set[str] = set()
        """The identifiers of images whose orders a worker has been asked for."""
        self._changed: set[str] = set()
        """Ids of requests that got orders which workers have not been told yet."""

    def admit(self, request: Request) -> None:
        """Looks up the orders of the images of a request that arrives."""
        self.of_request[request.request_id] = {
            feature.identifier: order
            for feature in visual(request)
            if (order := self.known.get(feature.identifier)) is not None
        }

    def next_missing(self, request: Request) -> tuple[int, MultiModalFeatureSpec]:
        """The first image of a request whose order is not known, and its number among the request's items."""
        known = self.of_request[request.request_id]
        return next(
            (index, feature)
            for index, feature in enumerate(request.mm_features)
            if feature.modality in VISUAL and feature.identifier not in known
        )

    def forget(self, request_id: str) -> None:
        """Forgets a request that has ended."""
        self.of_request.pop(request_id, None)
        self.awaiting.pop(request_id, None)
        self._changed.discard(request_id)

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
            feature.identifier
            for request_id, (request, _) in self.awaiting.items()
            for feature in visual(request)
            if request_id in encoder_cache.cached.get(feature.identifier, ())
        }
        wanted -= self._asked | self.known.keys()
        self._asked |= wanted
        setattr(output, WANTED, sorted(wanted))

    def take(self, wanted: list[str], orders: Mapping[str, Order]) -> Iterator[tuple[AwaitingRequest, bool]]:
        """Takes what workers have found out.

        Args:
            wanted: The identifiers that they were asked about.
            orders: What they answered.

        Yields:
            The requests that waited for these images, and whether the workers have answered.
        """
        self._asked -= set(wanted)
        self.known.update(orders)
        for request_id, waiting in list(self.awaiting.items()):
            own = self.of_request[request_id]
            mine = {feature.identifier for feature in visual(waiting.request)} - own.keys()
            if mine.isdisjoint(wanted):
                continue
            found = {identifier: orders[identifier] for identifier in mine & orders.keys()}
            own.update(found)
            self._changed.add(request_id)
            yield waiting, len(found) == len(mine.intersection(wanted))
