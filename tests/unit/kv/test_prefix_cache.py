# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a prefix cache over stages serves, beside stock vLLM's."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import Request

from tests.unit.kv.managers import ALL, BLOCK_SIZE, LAYOUTS, SPECS, Ask, asks, ends_step, manager
from vllm_vtw.retention import Retention


def ending_in_text(ask: Ask) -> Ask:
    """A prompt that ends in a picture keeps its end, which a longer one does not."""
    return ask if ask.pieces[-1][0] in ("text", "question") else Ask((*ask.pieces, ("question", 3)))


COURSES = st.lists(asks(most=8).map(ending_in_text), min_size=2, max_size=8)


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


def served(
    layout: str,
    course: list[Ask],
    retentions: Sequence[tuple[Retention, ...]],
    block_size: int = BLOCK_SIZE,
    ahead: int = 0,
) -> list[int]:
    requests = [
        ask.request(str(i), of_ask, block_size, ahead=ahead)
        for i, (ask, of_ask) in enumerate(zip(course, retentions, strict=True))
    ]
    vtw = manager(True, specs(layout, block_size), 4000)
    for stage in vtw.stage_managers:
        stage.retentions = {request.request_id: request.block_hashes.retentions for request in requests}
    return hits(vtw, requests)


def withdrawing(layout: str, course: list[Ask], align_to: int, block_size: int = BLOCK_SIZE) -> list[int]:
    retentions = [(ask.prompt.retention(align_to),) * 2 for ask in course]
    return served(layout, course, retentions, block_size)


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
def test_withdrawing_by_tokens_serves_as_much_from_the_cache_as_stock(layout: str, course: list[Ask]):
    assert withdrawing(layout, course, 1) == in_stock(course)


@pytest.mark.parametrize("layout", [layout for layout, of_layout in SPECS.items() if ALL not in of_layout])
@pytest.mark.parametrize("ahead", [1, 3])
@given(COURSES)
def test_blocks_are_shared_once_their_hashes_are_known(layout: str, ahead: int, course: list[Ask]):
    """A prompt is looked up without its last token, so only hashes that wait for more make a difference."""
    retentions = [(ask.prompt.retention(BLOCK_SIZE),) * 2 for ask in course]
    found = served(layout, course, retentions, ahead=ahead)
    most = [max(ask.starts[-1] - ahead, 0) // BLOCK_SIZE * BLOCK_SIZE for ask in course]
    assert found == [min(pair) for pair in zip(in_stock(course), most, strict=True)]


@LAYOUTS
@given(COURSES)
def test_tokens_of_images_that_are_drawn_by_lot_share_as_much_as_in_stock(layout: str, course: list[Ask]):
    assert served(layout, course, [ask.selected() for ask in course]) == in_stock(course)


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


def pages(ask: Ask, stage: int, exit_stage: int | None) -> dict[int, object]:
    """What a row holds up to the end of each page, by the number of the prompt's tokens up to there."""
    length, blocks = ask.starts[-1], range(0, ask.starts[-1] - BLOCK_SIZE + 1, BLOCK_SIZE)
    tokens = [kind for kind, size in ask.pieces for _ in range(size)]
    visual = {at for _, start, size in ask.pictures for at in range(start, start + size)}
    leaving = {
        b for b in blocks if exit_stage and stage >= exit_stage and visual >= {*range(b, b + BLOCK_SIZE)}
    }
    if length - BLOCK_SIZE in leaving:  # kept, but not in a longer prompt
        length -= BLOCK_SIZE
    found: dict[int, object] = {}
    for block in blocks:
        if block + BLOCK_SIZE <= length and block not in leaving:
            end = block + BLOCK_SIZE
            left_at = exit_stage if any(other < block for other in leaving) else None
            seen = [picture for picture in ask.pictures if picture[1] < end]
            found[end] = (tokens[:end], seen, left_at)
    return found


@LAYOUTS
@given(st.lists(st.tuples(asks(most=8), st.sampled_from([1, 2, None])), min_size=2, max_size=8))
def test_requests_with_exits_of_their_own_share_what_is_the_same(
    layout: str, course: list[tuple[Ask, int | None]]
):
    """What lies before the tokens that leave is the same for all exits, and so are these tokens in the stages
    before. What follows is the same for requests with the same exit."""
    retentions = [ask.leaving(exit_stage, BLOCK_SIZE) for ask, exit_stage in course]
    found = served(layout, [ask for ask, _ in course], retentions)
    offered: list[list[object]] = [[], [], []]
    for (ask, exit_stage), tokens in zip(course, found, strict=True):
        rows = [pages(ask, stage, exit_stage) for stage in range(3)]
        missing = [
            end for row, shared in zip(rows, offered, strict=True) for end in row if row[end] not in shared
        ]
        limits = [end - 1 for end in missing] + [max(ask.starts[-1] - 1, 0)]
        assert tokens == min(limits) // BLOCK_SIZE * BLOCK_SIZE
        for number, row in enumerate(rows):
            offered[number] += row.values()
