# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's KV cache manager over stages, against the obvious model, through any course of requests."""

from collections import Counter
from fractions import Fraction
from math import ceil

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from tests.engine.image_orders import drawn
from tests.unit.kv.managers import (
    BEFORE_THE_DECODER,
    BLOCK_SIZE,
    LAYOUTS,
    LOTS,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    SPECS,
    TEXT,
    Ask,
    asks,
    manager,
)
from vllm_vtw.retention import Retention


def pages_of(manager: SingleTypeKVCacheManager) -> int:
    return getattr(manager.kv_cache_spec, "pages", 1)


def stage_of(manager: SingleTypeKVCacheManager) -> int:
    return getattr(manager.kv_cache_spec, "stage", 0)


def rank_of(manager: SingleTypeKVCacheManager) -> int:
    return getattr(manager.kv_cache_spec, "rank", 0)


class Course(RuleBasedStateMachine):
    """Requests come, run in chunks, several in a step, grow, are preempted, come back, end."""

    @initialize(
        enable_caching=st.booleans(),
        align_to=st.sampled_from([1, BLOCK_SIZE]),
        layout=st.sampled_from([*sorted(SPECS), None]),
        by_lot=st.booleans(),
    )
    def start(self, enable_caching: bool, align_to: int, layout: str | None, by_lot: bool = False):
        self.manager = manager(enable_caching, SPECS[layout] if layout else BEFORE_THE_DECODER)
        self.align_to = align_to
        self.by_lot = by_lot
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        for stage in self.manager.stage_managers:
            stage.retentions = self.retentions
        self.requests: dict[str, tuple[Request, Ask]] = {}
        self.exits: dict[str, int | None] = {}
        self.cells: dict[tuple[int, int, int], object] = {}
        """What the KV cache holds, by pipeline rank, block and place in the block."""
        self.slots: dict[str, int] = {}
        """By request: the most tokens that it was given slots for since it last had none."""
        self.arrived = 0

    def managers(self):
        return self.manager.coordinator.single_type_managers

    def pick(self, data: st.DataObject) -> Request:
        return self.requests[data.draw(st.sampled_from(sorted(self.requests)))][0]

    @rule(ask=asks(), exit_stage=st.sampled_from([1, 1, 2, None]))
    def arrives(self, ask: Ask, exit_stage: int | None = 1):
        self.arrived += 1
        retentions = ask.leaving(exit_stage, self.align_to)
        if self.by_lot:
            retentions, exit_stage = ask.selected(stays=exit_stage is None), exit_stage and 1
        request = ask.request(str(self.arrived), retentions)
        self.retentions[request.request_id] = retentions
        self.requests[request.request_id] = (request, ask)
        self.exits[request.request_id] = exit_stage

    def held(self, request: Request, stage: int, num_tokens: int) -> list[int]:
        """The positions among the first `num_tokens` that a stage holds."""
        ask, exit_stage = self.requests[request.request_id][1], self.exits[request.request_id]
        if self.by_lot and exit_stage is not None and stage > 0:
            keep, gone = LOTS.stages[stage - 1].keep, set()
            for kind, start, size in ask.pictures:
                order = drawn(size, f"{kind}{size}")
                gone |= {start + token for token in order[ceil(Fraction(str(keep)) * size) :]}
            last = ask.prompt.length - 1
            return [position for position in range(num_tokens) if position == last or position not in gone]
        if exit_stage is None or stage < exit_stage or self.by_lot:
            return list(range(num_tokens))
        return ask.prompt.held(num_tokens, self.align_to)

    def rows(self, request: Request):
        """Group by group, what a request's blocks have to hold: all that the computed tokens come from."""
        tokens = tuple(request.all_token_ids[: request.num_computed_tokens])
        pictures = tuple((f.identifier, f.mm_position.offset) for f in request.mm_features)
        for group, m in enumerate(self.managers()):
            held = self.held(request, stage_of(m), len(tokens))
            for rank, position in enumerate(held):
                seen = [picture for picture in pictures if picture[1] <= position]
                block, place = divmod(rank, BLOCK_SIZE * pages_of(m))
                cell = (rank_of(m), m.req_to_blocks[request.request_id][block].block_id, place)
                # Text after tokens that have left depends on how many layers saw these.
                left_at = self.exits[request.request_id] if rank < position else None
                yield position, cell, (group, tokens[: position + 1], seen, held[: rank + 1], left_at)

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        together=st.integers(1, 3),
        chunk=st.integers(1, 60),
        drafts=st.integers(0, 3),
        steps=st.integers(1, 12),
    )
    def runs(self, data: st.DataObject, together: int, chunk: int, drafts: int, steps: int):
        requests = {(request := self.pick(data)).request_id: request for _ in range(together)}
        for _ in range(steps):
            self.step(list(requests.values()), chunk, drafts)

    def step(self, requests: list[Request], chunk: int, drafts: int):
        """Schedules a step and computes it."""
        starts: dict[str, int] = {}
        for request in requests:
            start = self.schedule(request, chunk, drafts)
            if start is not None:
                starts[request.request_id] = start
        copies, retained = self.manager.take_kv_cache_block_copies()
        copied = {
            (rank, copy.dst_block_id, place): content
            for copy in copies
            for (rank, block, place), content in self.cells.items()
            if (rank, block) == (copy.rank, copy.src_block_id)
        }
        self.cells |= copied
        for stage in self.manager.stage_managers:
            stage.offer_parts()
        self.manager.block_pool.free_blocks(retained)
        for request_id, start in starts.items():
            request, _ = self.requests[request_id]
            for position, cell, content in self.rows(request):
                if position >= start:
                    self.cells[cell] = content
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(TEXT)

    def schedule(self, request: Request, chunk: int, drafts: int) -> int | None:
        """Gives a request slots for some tokens. Returns the first of them, or None if there was no room."""
        computed, num_computed = self.manager.empty_kv_cache_blocks, 0
        if request.num_computed_tokens == 0:
            computed, num_computed, _ = self.manager.get_computed_blocks(request)
        chunk = min(chunk, request.num_tokens - request.num_computed_tokens - num_computed)
        before = self.free_blocks()
        if self.manager.allocate_slots(request, chunk, num_computed, computed, drafts) is None:
            assert self.free_blocks() == before
            return None
        start = request.num_computed_tokens + num_computed
        request.num_computed_tokens = start + chunk
        # Drafts get slots beyond what is computed, and are rejected here: the slots stay.
        slots = min(request.num_computed_tokens + drafts, MAX_MODEL_LEN)
        self.slots[request.request_id] = max(slots, self.slots.get(request.request_id, 0))
        return start

    def free_blocks(self) -> list[int]:
        return [pool.get_num_free_blocks() for pool in dict.fromkeys(m.block_pool for m in self.managers())]

    def preempt(self, request: Request):
        self.manager.free(request)
        request.num_computed_tokens = 0
        self.slots.pop(request.request_id, None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def is_preempted(self, data: st.DataObject):
        self.preempt(self.pick(data))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def ends(self, data: st.DataObject):
        request = self.pick(data)
        self.preempt(request)
        del self.requests[request.request_id], self.retentions[request.request_id]

    @rule()
    def the_cache_is_emptied(self):
        for request, _ in self.requests.values():
            self.preempt(request)
        assert self.manager.reset_prefix_cache()
        for request, _ in self.requests.values():
            # What no layer holds, as its tokens leave before the first one, needs no block to be found.
            found = self.manager.get_computed_blocks(request)[1]
            assert not any(self.held(request, stage_of(m), found) for m in self.managers())

    @invariant()
    def every_stage_holds_exactly_what_it_retains(self):
        for request, _ in getattr(self, "requests", {}).values():
            tokens = self.slots.get(request.request_id, 0)
            for m in self.managers():
                blocks = len(m.req_to_blocks.get(request.request_id, ()))
                held = len(self.held(request, stage_of(m), tokens))
                assert blocks == -(-held // (BLOCK_SIZE * pages_of(m)))

    @invariant()
    def every_block_holds_what_its_owners_would_have_written(self):
        for request, _ in getattr(self, "requests", {}).values():
            for _, cell, content in self.rows(request):
                assert self.cells[cell] == content

    @invariant()
    def a_block_has_as_many_owners_as_it_counts_and_none_is_lost(self):
        if not hasattr(self, "requests"):
            return
        for pool in {m.block_pool for m in self.managers()}:
            owners = Counter(
                block.block_id
                for m in self.managers()
                for blocks in m.req_to_blocks.values()
                for block in blocks
                if m.block_pool is pool
            )
            assert all(count == pool.blocks[block_id].ref_cnt for block_id, count in owners.items())
            # vLLM keeps one block, the null block, for itself.
            assert pool.get_num_free_blocks() + len(owners) == NUM_BLOCKS - 1

    @invariant()
    def the_counts_are_those_of_the_rows(self):
        if not hasattr(self, "requests"):
            return
        held: Counter[int] = Counter()
        pages = []
        for m in self.managers():
            blocks = {block.block_id for row in m.req_to_blocks.values() for block in row}
            held[stage_of(m)] += len(blocks)
            if stage_of(m) == 0:
                pages.append(len(blocks) * pages_of(m))
        assert self.manager.held_blocks() == held
        requests = [request for request, _ in self.requests.values()]
        in_stock = sum(-(-request.num_computed_tokens // BLOCK_SIZE) for request in requests)
        # Groups with several pages in a block may hold some that are empty.
        assert self.manager.pages_in_stock(requests) == (min(pages) if pages else in_stock)

    def teardown(self):
        for request, _ in getattr(self, "requests", {}).values():
            self.manager.free(request)
        if hasattr(self, "requests"):
            assert set(self.free_blocks()) == {NUM_BLOCKS - 1}


@LAYOUTS
def test_part_of_a_block_is_shared_from_the_step_on_that_follows_the_one_that_computes_it(layout: str):
    """A copy in the same step would be made before there is anything to copy."""
    course = Course()
    course.start(enable_caching=True, align_to=BLOCK_SIZE, layout=layout)
    ask = Ask((("text", 8), ("cat", 20), ("question", 20)))
    for _ in range(3):
        course.arrives(ask)
    first, second, third = (request for request, _ in course.requests.values())
    course.step([first, second], 60, 0)
    course.every_block_holds_what_its_owners_would_have_written()
    course.every_stage_holds_exactly_what_it_retains()
    assert course.manager.get_computed_blocks(third)[1] == 40
    course.step([third], 60, 0)
    course.every_block_holds_what_its_owners_would_have_written()
    course.a_block_has_as_many_owners_as_it_counts_and_none_is_lost()
    course.teardown()


def test_a_request_that_is_preempted_before_its_step_runs_offers_no_part_of_a_block():
    course = Course()
    course.start(enable_caching=True, align_to=BLOCK_SIZE, layout="pages")
    for _ in range(2):
        course.arrives(Ask((("text", 20),)))
    first, second = (request for request, _ in course.requests.values())
    course.schedule(first, 60, 0)
    course.preempt(first)
    for stage in course.manager.stage_managers:
        stage.offer_parts()
    assert course.manager.get_computed_blocks(second)[1] == 0


@LAYOUTS
def test_what_follows_a_kept_picture_is_neither_offered_nor_taken(layout: str):
    """A prompt that ends in a picture keeps its last block; one that goes on from there does not."""
    start = (("text", 8), ("dog", 8))
    ends_in_picture, goes_on = Ask(start), Ask((*start, ("text", 20)))
    for order in ((ends_in_picture, goes_on), (goes_on, ends_in_picture)):
        course = Course()
        course.start(enable_caching=True, align_to=BLOCK_SIZE, layout=layout)
        for ask in order:
            course.arrives(ask)
        for request, _ in course.requests.values():
            for again in (False, True):
                for _ in range(20):
                    course.step([request], 60, 0)
                course.every_block_holds_what_its_owners_would_have_written()
                if not again:
                    course.manager.free(request)
                    request.num_computed_tokens = 0
        course.teardown()


Course.TestCase.settings = settings(max_examples=60, stateful_step_count=40)


test_course = Course.TestCase
