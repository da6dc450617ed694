"""vLLM's KV cache manager over stages, against the obvious model, through any course of requests."""

from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.unit.strategies import Prompt, prompts
from vllm_vtw.kv.manager import StageManager
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.retention import Retention

BLOCK_SIZE = 8
NUM_BLOCKS = 60
MAX_MODEL_LEN = 400
ALL = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
# A stage may be several groups; each has blocks of its own.
SPECS = (ALL, StageSpec.like(ALL, 1), StageSpec.like(ALL, 1), StageSpec.like(ALL, 2))


def manager(enable_caching: bool) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(SPECS)]
    config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=enable_caching,
    )


class Course(RuleBasedStateMachine):
    """Requests come, run in chunks, grow, are preempted, come back, end."""

    @initialize(enable_caching=st.booleans(), align_to=st.sampled_from([1, BLOCK_SIZE]))
    def start(self, enable_caching: bool, align_to: int):
        init_none_hash(sha256)
        self.manager = manager(enable_caching)
        self.align_to = align_to
        self.retentions: dict[str, tuple[Retention, ...]] = {}
        for stage in self.managers()[1:]:
            assert isinstance(stage, StageManager)
            stage.retentions = self.retentions
        self.requests: dict[str, tuple[Request, Prompt]] = {}
        self.slots: dict[str, int] = {}
        """By request: the most tokens that it was given slots for since it last had none."""
        self.arrived = 0

    def managers(self):
        return self.manager.coordinator.single_type_managers

    def pick(self, data: st.DataObject) -> Request:
        return self.requests[data.draw(st.sampled_from(sorted(self.requests)))][0]

    @rule(prompt=prompts())
    def arrives(self, prompt: Prompt):
        self.arrived += 1
        request = Request(
            str(self.arrived),
            # Prompts share prefixes, so that a cache that took blocks it must not would show.
            prompt_token_ids=[0] * prompt.length,
            sampling_params=SamplingParams(max_tokens=50),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )
        self.retentions[request.request_id] = (prompt.retention(self.align_to),) * 2
        self.requests[request.request_id] = (request, prompt)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), chunk=st.integers(1, 60), drafts=st.integers(0, 3))
    def runs(self, data: st.DataObject, chunk: int, drafts: int):
        request = self.pick(data)
        computed, num_computed = self.manager.empty_kv_cache_blocks, 0
        if request.num_computed_tokens == 0:
            computed, num_computed, _ = self.manager.get_computed_blocks(request)
        chunk = min(chunk, request.num_tokens - request.num_computed_tokens - num_computed)
        before = self.manager.block_pool.get_num_free_blocks()
        if self.manager.allocate_slots(request, chunk, num_computed, computed, drafts) is None:
            assert self.manager.block_pool.get_num_free_blocks() == before
            return
        request.num_computed_tokens += num_computed + chunk
        # Drafts get slots beyond what is computed, and are rejected here: the slots stay.
        slots = min(request.num_computed_tokens + drafts, MAX_MODEL_LEN)
        self.slots[request.request_id] = max(slots, self.slots.get(request.request_id, 0))
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(1)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def is_preempted(self, data: st.DataObject):
        request = self.pick(data)
        self.manager.free(request)
        request.num_computed_tokens = 0
        self.slots.pop(request.request_id, None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def ends(self, data: st.DataObject):
        request = self.pick(data)
        self.manager.free(request)
        self.slots.pop(request.request_id, None)
        del self.requests[request.request_id], self.retentions[request.request_id]

    @invariant()
    def every_stage_holds_exactly_what_it_retains(self):
        for request, prompt in getattr(self, "requests", {}).values():
            tokens = self.slots.get(request.request_id, 0)
            held = (tokens, *[len(prompt.held(tokens, self.align_to))] * 3)
            blocks = [len(m.req_to_blocks.get(request.request_id, ())) for m in self.managers()]
            assert blocks == [-(-count // BLOCK_SIZE) for count in held]

    @invariant()
    def no_block_has_two_owners_and_none_is_lost(self):
        if not hasattr(self, "requests"):
            return
        owners = Counter(
            block.block_id for m in self.managers() for blocks in m.req_to_blocks.values() for block in blocks
        )
        assert all(count == 1 for count in owners.values())
        # vLLM keeps one block, the null block, for itself.
        assert self.manager.block_pool.get_num_free_blocks() + len(owners) == NUM_BLOCKS - 1

    def teardown(self):
        for request, _ in getattr(self, "requests", {}).values():
            self.manager.free(request)
        assert self.manager.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1


Course.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_course = Course.TestCase
