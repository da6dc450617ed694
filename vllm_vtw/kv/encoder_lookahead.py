# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's scheduler, which can have images encoded before any step computes their tokens."""

from typing import Any

from vllm.v1.request import Request

from vllm_vtw.kv.guard import CLIENT
from vllm_vtw.kv.guarded_scheduler import GuardedScheduler
from vllm_vtw.kv.image_orders import ImageOrders


class EncoderLookahead(GuardedScheduler):
    """Encodes the images of requests for rankings by features, which read what the encoder has computed.

    Attributes:
        image_orders: Which tokens of images stay, under such a ranking.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.image_orders = ImageOrders()

    def _encode_ahead(
        self,
        awaits_from: int,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **options: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Schedules images of a request, up to the first one whose order is not known at least.

        Of the tokens that may leave of this image, none is scheduled. If it cannot be encoded in this step,
        one token before them is left for the step that can. A request without tokens in a step is not
        scheduled, and neither are its images.
        """
        index, image = self.image_orders.next_missing(request)
        stop = image.mm_position.offset + image.mm_position.length
        window = max(num_new_tokens, stop - num_computed_tokens)
        chosen: tuple[list[int], int, int, list[int], list[int]]
        chosen = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, window, encoder_compute_budget, *args, **options
        )
        encodes, before_missing, budget, external, duplicates = chosen
        holds = request.request_id in self.encoder_cache_manager.cached.get(image.identifier, ())
        is_encoded = holds or index in encodes
        if self.guard is not None and not is_encoded and request.client_index != CLIENT:
            # The images of the answer that is being read may fill the encoder cache.
            self.guard.needs_room = True
        room = awaits_from - num_computed_tokens - (not is_encoded)
        num_new_tokens = max(0, min(num_new_tokens, before_missing, room))
        if num_new_tokens == 0:
            return [], 0, encoder_compute_budget, [], []
        return encodes, num_new_tokens, budget, external, duplicates

    def reset_encoder_cache(self) -> None:
        self.image_orders.forget_images()
        super().reset_encoder_cache()
