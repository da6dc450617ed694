# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's scheduler over stages, with a made-up worker in place of a model: every request is served."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.small_llava import SmallLlava
from tests.engine.gates import gated, random_gates
from tests.unit.kv.managers import BLOCK_SIZE, TEXT, Ask, asks
from vllm_vtw.config import EXITS, ORDERS, WANTED
from vllm_vtw.kv import groups
from vllm_vtw.kv.prefill_turns import PATIENCE
from vllm_vtw.kv.scheduler import VTWScheduler, make_scheduler
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.startup.options import layer_groups, model_shape, vtw_config

MODEL = SmallLlava()
NUM_BLOCKS = 160
STEP_TOKENS = 120
"""As many as the longest prompt of `asks()` has."""
STAGES = (Stage(3, 0.5), Stage(6, 0.2))
POLICIES = {
    "layer": Policy.withdraw_at(3, MODEL.layers),
    "ranked": Policy(STAGES),
    "by image": Policy(STAGES, ranked_by="random"),
    "by features": Policy(STAGES, ranked_by="diversity"),
}
ONE_STEP = ("ranked", "gated")
"""The policies under which a prompt is computed in one step, from its first image on."""


class Engine:
    """A scheduler, and a worker that computes nothing.

    Args:
        folder: The model's checkpoint.
        vtw: The plugin's options.
    """

    def __init__(self, folder: Path, vtw: dict[str, Any]) -> None:
        self.config = EngineArgs(
            model=str(folder),
            model_impl="vtw",
            additional_config={"vtw": vtw},
            dtype="float32",
            block_size=BLOCK_SIZE,
            max_model_len=400,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=4,
            enable_prefix_caching=True,
            async_scheduling=False,
        ).create_engine_config()
        self.config.cache_config.num_gpu_blocks = NUM_BLOCKS
        self.config.cache_config.kv_cache_layout = "LBHNC"  # an engine chooses it
        self.policy = vtw_config(self.config).policy
        kv_cache = KVCacheConfig(NUM_BLOCKS, [], self.groups())
        made = make_scheduler(
            self.config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self.scheduler: VTWScheduler = made
        self.arrived = 0

    def groups(self) -> list[KVCacheGroupSpec]:
        """The KV-cache groups as vLLM makes them of what the layers say."""
        heads = {"num_kv_heads": MODEL.kv_heads, "head_size": MODEL.hidden // MODEL.heads}
        plain = FullAttentionSpec(block_size=BLOCK_SIZE, dtype=torch.float32, **heads)
        split = layer_groups(self.config, self.policy)
        specs: dict[str, KVCacheSpec] = {
            f"layers.{index}": plain
            if (group.stage, group.pages) == (0, 1)
            else StageSpec.like(plain, split, group)
            for index, group in enumerate(split.by_layer())
        }
        of_all = getattr(groups.planning, "get_global_kv_cache_groups", None)
        made = (
            groups.planning.get_kv_cache_groups(self.config, specs)
            if of_all is None
            else of_all(self.config, [specs])
        )
        assert sorted(len(group.layer_names) for group in made) == sorted(g.layers for g in split.groups)
        return made

    def add(self, ask: Ask, max_tokens: int = 5) -> Request:
        self.arrived += 1
        request = ask.request(str(self.arrived), None, max_tokens=max_tokens)
        self.scheduler.add_request(request)
        return request

    def step(self, exits: Sequence[int | None] = (None,)) -> list[str]:
        """Schedules and computes a step. Returns the ids of the requests in it."""
        output = self.scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[request_id] for request_id in ids]
        for request in requests:
            self.check(request, output.num_scheduled_tokens[request.request_id])
        sampled = [[TEXT] if one.num_computed_tokens >= one.num_tokens else [] for one in requests]
        made = ModelRunnerOutput(ids, {name: row for row, name in enumerate(ids)}, sampled)
        self.decide(requests, made, exits)
        self.order(output, made)
        self.scheduler.update_from_output(output, made)
        return ids

    def check(self, request: Request, num_tokens: int) -> None:
        """A step has all tokens that have to be computed in one step, or none."""
        one_step = self.scheduler._one_step(request)
        if one_step is not None:
            for border in (request.num_computed_tokens - num_tokens, request.num_computed_tokens):
                assert not one_step.start < border < one_step.stop

    def decide(self, requests: list[Request], made: ModelRunnerOutput, exits: Sequence[int | None]) -> None:
        """What gates say of the prompts that are computed."""
        decided = {}
        for request in requests:
            one_step = self.scheduler._one_step(request)
            if one_step is not None and one_step.gated and request.num_computed_tokens >= one_step.stop:
                decided[request.request_id] = exits[int(request.request_id) % len(exits)]
        setattr(made, EXITS, decided)

    def order(self, output: SchedulerOutput, made: ModelRunnerOutput) -> None:
        """The orders of the images that the scheduler asks for."""
        wanted = getattr(output, WANTED, [])
        orders = {key: np.arange(self.policy.most_kept(key[1]), dtype=np.int32) for key in wanted}
        setattr(made, ORDERS, orders)

    def free_blocks(self) -> list[int]:
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return [manager.block_pool.get_num_free_blocks() for manager in managers]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Callable[[str], Engine]:
    """Makes an engine of a policy, once."""
    folder = MODEL.save(tmp_path_factory.mktemp("checkpoint"))
    made: dict[str, Engine] = {}

    def make(name: str) -> Engine:
        if name not in made:
            if name == "gated":
                file = tmp_path_factory.mktemp("policy")
                made[name] = Engine(folder, gated(file, random_gates((3, 6)), (0, 0)).options)
            else:
                plain = Engine(folder, {"layer": 3})
                policy = POLICIES[name].to_json(model_shape(plain.config).as_dict())
                made[name] = Engine(folder, {"policy": policy})
        return made[name]

    return make


@pytest.mark.parametrize("name", [*POLICIES, "gated"])
@given(
    course=st.lists(st.tuples(asks(), st.integers(0, 4)), min_size=1, max_size=8),
    exits=st.lists(st.sampled_from([1, 2, None]), min_size=1, max_size=3),
)
def test_every_request_is_served(engine, name: str, course, exits):
    """Whatever comes when, each request gets all of its tokens, and gives back all of its blocks."""
    of_policy = engine(name)
    free = of_policy.free_blocks()
    requests = []
    for ask, steps in course:
        requests.append(of_policy.add(ask))
        for _ in range(steps):
            of_policy.step(exits)
    for _ in range(40 * len(course)):
        if not of_policy.scheduler.has_unfinished_requests():
            break
        of_policy.step(exits)
    assert [request.get_finished_reason().name for request in requests] == ["LENGTH"] * len(requests)
    assert of_policy.free_blocks() == free
    scheduler = of_policy.scheduler
    assert not (scheduler.retentions)
    assert not (scheduler.awaiting_gates)
    assert not (scheduler.turns.since)


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_prompt_that_needs_a_whole_step_is_not_overtaken_for_ever(engine, name: str):
    """A request decodes, and another comes with every step: vLLM 0.33 would admit them all before it."""
    of_policy = engine(name)
    of_policy.add(Ask((("text", 20),)), max_tokens=8 * PATIENCE)
    of_policy.step()
    long = of_policy.add(Ask((("cat", STEP_TOKENS - 20), ("question", 20))))
    waited, others = 0, set[str]()
    while long.request_id not in (scheduled := of_policy.step()):
        others.update(scheduled)
        waited += 1
        assert waited <= PATIENCE + 2
        of_policy.add(Ask((("text", 3),)), max_tokens=1)
    assert len(others) > PATIENCE // 2
    while of_policy.scheduler.has_unfinished_requests():
        of_policy.step()
    assert long.get_finished_reason().name == "LENGTH"


def test_the_reason_of_an_error_reaches_the_client_where_vllm_passes_it_on(engine):
    of_policy = engine("layer")
    request = of_policy.add(Ask((("text", 20),)))
    of_policy.scheduler._end_with_error(request, "is not wanted")
    output = of_policy.scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    made = ModelRunnerOutput(ids, {name: row for row, name in enumerate(ids)}, [[TEXT]])
    (told,) = of_policy.scheduler.update_from_output(output, made)[0].outputs[-1:]
    assert told.finish_reason.name == "ERROR"
    if hasattr(told, "error"):
        assert told.error.message == "The request is not wanted."
    assert not of_policy.scheduler.has_unfinished_requests()
