# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a prefix cache over stages serves, beside stock vLLM's."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import Request

from tests.unit.kv.managers import ALL, BLOCK_SIZE, LAYOUTS, SPECS, Ask, asks, ends_step, manager
from vllm_vtw.kv.spec import StageSpec

COURSES = st.lists(asks(most=8), min_size=2, max_size=8)


def hits(manager: KVCacheManager, requests: Iterable[Request]) -> list[int]:
    """Tokens of each request that were served from the cache, each computed and decoded to its end."""
    served = []
    for request in requests:
        computed, num_computed, _ = manager.get_computed_blocks(request)
        served.append(num_computed)
        tokens = request.num_tokens - num_computed
        assert manager.allocate_slots(request, tokens, num_computed, computed) is not None
        ends_step(manager)
        request.num_computed_tokens = request.num_tokens
        for _ in range(2 * BLOCK_SIZE):
            request.append_output_token_ids(1)
            manager.allocate_slots(request, 1)
            ends_step(manager)
            request.num_computed_tokens += 1
        manager.free(request)
    return served


def specs(layout: str, block_size: int = BLOCK_SIZE) -> list[AttentionSpec]:
    return [replace(spec, block_size=block_size) for spec in SPECS[layout]]


def in_stock(course: list[Ask], block_size: int = BLOCK_SIZE) -> list[int]:
    requests = [ask.request(str(i), None, block_size) for i, ask in enumerate(course)]
    return hits(manager(True, [replace(ALL, block_size=block_size)], 4000), requests)


def withdrawing(layout: str, course: list[Ask], align_to: int, block_size: int = BLOCK_SIZE) -> list[int]:
    requests = [
        ask.request(str(i), (ask.prompt.retention(align_to),) * 2, block_size) for i, ask in enumerate(course)
    ]
    vtw = manager(True, specs(layout, block_size), 4000)
    for stage in vtw.stage_managers:
        stage.retentions = {request.request_id: request.block_hashes.retentions for request in requests}
    return hits(vtw, requests)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@LAYOUTS
@given(COURSES)
def test_withdrawing_by_blocks_serves_as_much_from_the_cache_as_stock(
    layout: str, block_size: int, course: list[Ask]
):
    course = [ask.in_blocks_of(block_size) for ask in course]
    assert withdrawing(layout, course, block_size, block_size) == in_stock(course, block_size)


@LAYOUTS
@given(COURSES)
def test_withdrawing_by_tokens_serves_what_lies_on_borders_of_blocks(layout: str, course: list[Ask]):
    """Up to the last border of stock's blocks where the pages of every row ended on such a border, and all
    whole blocks of the row did."""
    pages = [spec.pages for spec in SPECS[layout] if isinstance(spec, StageSpec) and spec.stage]

    def is_border(ask: Ask, num_tokens: int) -> bool:
        held = ask.prompt.held(num_tokens, align_to=1)
        ends = [position + 1 for position in held[BLOCK_SIZE - 1 :: BLOCK_SIZE]]
        needed = {end for number in pages for end in [*ends[number - 1 :: number], *ends[-1:]]}
        return len(held) % BLOCK_SIZE == 0 and all(end % BLOCK_SIZE == 0 for end in needed)

    allowed = [
        max(border for border in range(0, hit + 1, BLOCK_SIZE) if is_border(ask, border))
        for ask, hit in zip(course, in_stock(course), strict=True)
    ]
    assert withdrawing(layout, course, 1) == allowed


@pytest.mark.parametrize("align_to", [1, BLOCK_SIZE])
@LAYOUTS
@given(ask=asks())
def test_a_request_that_goes_on_finds_what_the_one_before_says_it_shared(
    layout: str, align_to: int, ask: Ask
):
    """What usage says was written to the cache, in prompt tokens."""
    first, second = ask, Ask((*ask.pieces, ("question", BLOCK_SIZE)))
    vtw = manager(True, SPECS[layout], num_blocks=4000)
    requests = [
        one.request(str(i), (one.prompt.retention(align_to),) * 2) for i, one in enumerate((first, second))
    ]
    for stage in vtw.stage_managers:
        stage.retentions = {request.request_id: request.block_hashes.retentions for request in requests}
    shared = []
    for request in requests:
        computed, found, _ = vtw.get_computed_blocks(request)
        assert vtw.allocate_slots(request, request.num_tokens - found, found, computed) is not None
        ends_step(vtw)
        shared.append((found, vtw.estimate_cached_tokens(request)))
    assert shared[0][0] == 0
    # A prompt that goes on behind a picture withdraws that picture's end too, and needs less to be there.
    ends_in_picture = first.pieces[-1][0] in ("cat", "dog")
    assert shared[1][0] == shared[0][1] or (ends_in_picture and shared[1][0] > shared[0][1])
