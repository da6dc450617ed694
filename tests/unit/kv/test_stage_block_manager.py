# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's KV cache manager over stages, against the obvious model, through any course of requests."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.unit.strategies import Prompt
from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.kv.stage_block_manager import StagedBlockHashes
from vllm_vtw.policy import Policy
from vllm_vtw.retention import Retention

init_none_hash(sha256)

BLOCK_SIZE = 8
NUM_BLOCKS = 60
MAX_MODEL_LEN = 400
ALL = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)


def of_stage(stage: int, pages: int = 1, rank: int = 0) -> StageSpec:
    group = LayerGroup(stage, 4 // pages, pages, rank)
    return StageSpec.like(ALL, LayerGroups((LayerGroup(0, 4, 1), LayerGroup(2, 4, 1, 1), group)), group)


# A stage may be several groups; each has blocks of its own.
SPECS: dict[str, tuple[AttentionSpec, ...]] = {
    "one page": (ALL, of_stage(1), of_stage(1), of_stage(2)),
    "pages": (ALL, of_stage(1), of_stage(1, 3), of_stage(2, 2)),
    "pages in stage 0": (ALL, of_stage(0, 2), of_stage(1, 4), of_stage(2)),
    "pages in all of stage 0": (of_stage(0, 3), of_stage(1), of_stage(1, 2), of_stage(2, 2)),
    "two ranks": (of_stage(0), of_stage(0, 2, 1), of_stage(1, 1, 1), of_stage(2, 4, 1)),
}
LAYOUTS = pytest.mark.parametrize("layout", SPECS)

TEXT = 4
"""The token of texts, which answers are made of too: a prompt may go on as another was answered."""
TOKENS = {"text": TEXT, "question": 5, "cat": 9, "dog": 9}
PIECES = [(kind, size) for kind in TOKENS for size in (3, 8, 20)]
"""Few, so that many prompts begin alike."""


@dataclass(frozen=True)
class Ask:
    """A prompt of texts and pictures."""

    pieces: tuple[tuple[str, int], ...]

    @property
    def starts(self) -> list[int]:
        return list(accumulate((size for _, size in self.pieces), initial=0))

    @property
    def pictures(self) -> list[tuple[str, int, int]]:
        """What each shows, its start and its length."""
        placed = zip(self.pieces, self.starts[:-1], strict=True)
        return [(kind, start, size) for (kind, size), start in placed if kind in ("cat", "dog")]

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.starts[-1], tuple((start, start + size) for _, start, size in self.pictures))

    def in_blocks_of(self, block_size: int) -> "Ask":
        """The same with every piece as long beside a block as it is beside one of `BLOCK_SIZE`."""
        return Ask(tuple((kind, size * block_size // BLOCK_SIZE) for kind, size in self.pieces))

    def request(
        self, request_id: str, retentions: tuple[Retention, ...] | None, block_size: int = BLOCK_SIZE
    ) -> Request:
        request = Request(
            request_id,
            prompt_token_ids=[TOKENS[kind] for kind, size in self.pieces for _ in range(size)],
            sampling_params=SamplingParams(max_tokens=50),
            pooling_params=None,
            mm_features=[
                MultiModalFeatureSpec(None, "image", f"{kind}{size}", PlaceholderRange(start, size))
                for kind, start, size in self.pictures
            ],
            block_hasher=get_request_block_hasher(block_size, sha256),
        )
        if retentions is not None:
            request.block_hashes = StagedBlockHashes(request.block_hashes, retentions)
        return request


def asks(most: int = 6) -> st.SearchStrategy[Ask]:
    return st.builds(Ask, st.lists(st.sampled_from(PIECES), min_size=1, max_size=most).map(tuple))


def manager(
    enable_caching: bool, specs: Sequence[AttentionSpec], num_blocks: int = NUM_BLOCKS
) -> StagedKVCacheManager:
    block_size = specs[0].block_size
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    made = KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN * block_size // BLOCK_SIZE,
        scheduler_block_size=block_size,
        hash_block_size=block_size,
        enable_caching=enable_caching,
    )
    StagedKVCacheManager.adopt(made)
    return made


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
        layout=st.sampled_from(sorted(SPECS)),
    )
    def start(self, enable_caching: bool, align_to: int, layout: str):
        self.manager = manager(enable_caching, SPECS[layout])
        self.align_to = align_to
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        for stage in self.manager.stage_managers:
            stage.retentions = self.retentions
        self.requests: dict[str, tuple[Request, Prompt]] = {}
        self.cells: dict[tuple[int, int, int], object] = {}
        """What the KV cache holds, by pipeline rank, block and place in the block."""
        self.slots: dict[str, int] = {}
        """By request: the most tokens that it was given slots for since it last had none."""
        self.arrived = 0

    def managers(self):
        return self.manager.coordinator.single_type_managers

    def pick(self, data: st.DataObject) -> Request:
        return self.requests[data.draw(st.sampled_from(sorted(self.requests)))][0]

    @rule(ask=asks())
    def arrives(self, ask: Ask):
        self.arrived += 1
        retentions = (ask.prompt.retention(self.align_to),) * 2
        request = ask.request(str(self.arrived), retentions)
        self.retentions[request.request_id] = retentions
        self.requests[request.request_id] = (request, ask.prompt)

    def rows(self, request: Request):
        """Group by group, what a request's blocks have to hold: all that the computed tokens come from."""
        prompt = self.requests[request.request_id][1]
        tokens = tuple(request.all_token_ids[: request.num_computed_tokens])
        pictures = tuple((f.identifier, f.mm_position.offset) for f in request.mm_features)
        for group, m in enumerate(self.managers()):
            held = prompt.held(len(tokens), self.align_to) if stage_of(m) else range(len(tokens))
            for rank, position in enumerate(held):
                seen = [picture for picture in pictures if picture[1] <= position]
                block, place = divmod(rank, BLOCK_SIZE * pages_of(m))
                cell = (rank_of(m), m.req_to_blocks[request.request_id][block].block_id, place)
                yield position, cell, (group, tokens[: position + 1], seen, list(held[: rank + 1]))

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
            assert self.manager.get_computed_blocks(request)[1] == 0

    @invariant()
    def every_stage_holds_exactly_what_it_retains(self):
        for request, prompt in getattr(self, "requests", {}).values():
            tokens = self.slots.get(request.request_id, 0)
            of_stages = [tokens, *[len(prompt.held(tokens, self.align_to))] * 2]
            for m in self.managers():
                blocks = len(m.req_to_blocks.get(request.request_id, ()))
                assert blocks == -(-of_stages[stage_of(m)] // (BLOCK_SIZE * pages_of(m)))

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
        # Groups with several pages in a block may hold some that are empty.
        assert self.manager.pages_of_stage_0() == min(pages)

    def teardown(self):
        for request, _ in getattr(self, "requests", {}).values():
            self.manager.free(request)
        if hasattr(self, "requests"):
            assert set(self.free_blocks()) == {NUM_BLOCKS - 1}


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


def ends_step(manager: KVCacheManager) -> None:
    for stage in getattr(manager, "stage_managers", ()):
        stage.offer_parts()
    _, retained = manager.take_kv_cache_block_copies()
    manager.block_pool.free_blocks(retained)


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


Course.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_course = Course.TestCase


@given(st.integers(2, 32), st.integers(1, 5000), st.data())
def test_memory_of_the_largest_request_is_that_of_the_rank_that_needs_the_most(
    num_layers: int, tokens: int, data: st.DataObject
):
    """vLLM adds up the groups of all ranks. No more than a block a group is counted too much."""
    policy = Policy.withdraw_at(data.draw(st.integers(1, num_layers - 1)), num_layers)
    cut = data.draw(st.integers(1, num_layers - 1))
    groups = LayerGroups.of(policy, num_layers, [range(cut), range(cut, num_layers)])
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=tokens))
    counted = 0
    for group in groups.groups:
        spec = StageSpec.like(ALL, groups, group)
        counted += -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
    needed = groups.blocks([tokens] * groups.num_stages, BLOCK_SIZE)
    assert needed <= counted < needed + groups.most_groups
