# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Speculative decoding with a drafter: its answers, and what the drafter is told and says."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from tests.engine.drafters import DraftModel, Eagle, drafter
from tests.engine.engines import (
    BLOCK_SIZE,
    GREEDY,
    MODEL,
    SHAPES,
    assert_follows,
    free_blocks,
    running,
    scheduler_of,
)
from tests.engine.gates import assert_gated, dividing
from tests.engine.test_ranked import assert_ranked, written

METHODS = ("eagle", "eagle3", "draft_model")
slow = pytest.mark.slow
LAYER = MODEL.layers // 2
# The encoder cache has room for as many tokens. With EAGLE, stock vLLM waits forever for the second of two
# images that touch if only one has room in it.
ENGINE = {"max_num_batched_tokens": 200, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("drafters")
    configs = {method: drafter(method, folder / method, checkpoint(MODEL), MODEL) for method in METHODS}
    return configs.__getitem__


class Told:
    """What a drafter was told and said, by request and step."""

    def __init__(self) -> None:
        self.states: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.drafts: defaultdict[str, list[list[int]]] = defaultdict(list)

    def note(self, runner: RunnerV1, starts: list[int], states: torch.Tensor, drafts: torch.Tensor) -> None:
        for row, request in enumerate(runner.input_batch.req_ids):
            self.states[request].append(states[starts[row] : starts[row + 1]].clone())
            if not runner.discard_request_mask.np[row]:
                self.drafts[request].append(drafts[row].tolist())


@pytest.fixture
def told(monkeypatch) -> Told:
    told, runners = Told(), []
    of_runner, of_drafter = RunnerV1.propose_draft_token_ids, SpecDecodeBaseProposer.propose

    def propose_of_runner(self, *args, **kwargs):
        runners.append(self)
        return of_runner(self, *args, **kwargs)

    def propose(self, **given):
        # The drafter writes into the batch's metadata.
        starts = given["common_attn_metadata"].query_start_loc_cpu.tolist()
        drafts = of_drafter(self, **given)
        told.note(runners[-1], starts, given["target_hidden_states"], drafts)
        return drafts

    monkeypatch.setattr(RunnerV1, "propose_draft_token_ids", propose_of_runner)
    monkeypatch.setattr(SpecDecodeBaseProposer, "propose", propose)
    return told


@pytest.mark.parametrize("align", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_answers(checkpoint, reference, config, method, align):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = ENGINE | {"speculative_config": config(method), "enable_prefix_caching": align}
    with running(folder, {"layer": LAYER, "align": align}, **options) as llm:
        all_free = free_blocks(llm)
        for _ in range(2):
            outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
            assert free_blocks(llm) == all_free
            for ask, output in zip(SHAPES, outputs, strict=True):
                answer = output.outputs[0].token_ids
                assert len(answer) == GREEDY.max_tokens
                assert_follows(
                    oracle, ask, output.prompt_token_ids, answer, LAYER, BLOCK_SIZE if align else 1
                )
    assert (sum(output.num_cached_tokens for output in outputs) > 300) == align


@pytest.mark.parametrize("layer", [LAYER, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_drafter_is_told_and_says(checkpoint, reference, config, told, method, layer):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    # Without chunks: vLLM tells drafters another token than the next one at the end of a chunk.
    options = {"speculative_config": config(method), "max_num_batched_tokens": 2048, "max_num_seqs": 8}
    with running(folder, {"layer": layer, "align": False}, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
    drafts = {request.split("-")[0]: found for request, found in told.drafts.items()}
    seen = {request.split("-")[0]: found for request, found in told.states.items()}
    for ask, output in zip(SHAPES, outputs, strict=True):
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        dropped = oracle.dropped([*prompt, *answer], len(prompt), 1)
        embeds = [oracle.embeds(image) for image in ask.images]
        states = oracle.states([*prompt, *answer], embeds, layer, dropped)
        of_prompt = torch.cat(seen[output.request_id])[: len(prompt)]
        if method == "eagle":
            expected = oracle.model.model.language_model.norm(states[-1])
        elif method == "eagle3":
            # After the head's own projection of the states of three layers.
            expected = torch.cat([states[2], states[MODEL.layers // 2], states[MODEL.layers - 3]], -1)
        if method != "draft_model":
            assert of_prompt.allclose(expected[: len(prompt)], atol=1e-3)
        if method == "eagle3":
            continue
        said = 0
        for proposal in drafts[output.request_id]:
            known = [*prompt, *answer[: said + 1]]
            if len(known) > len(prompt) + len(answer) - len(proposal):
                break
            if method == "eagle":
                right = Eagle(config(method)["model"], oracle).drafts(known, states[-1][: len(known) - 1])
            else:
                right = DraftModel(config(method)["model"]).drafts(known)
            assert proposal == right, ask.name
            accepted = next(
                (at for at, token in enumerate(proposal) if token != answer[said + 1 + at]), len(proposal)
            )
            said += accepted + 1
        assert said > len(answer) // 2


@slow
@pytest.mark.parametrize("method", METHODS)
def test_ranked_schedules_and_gates(checkpoint, reference, config, tmp_path, method):
    folder, schedule = checkpoint(MODEL), {4: 0.5, 6: 0.05}
    oracle = reference(folder)
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    options = {"max_num_batched_tokens": 640, "max_num_seqs": 8, "speculative_config": config(method)}
    with running(folder, written(tmp_path, schedule), **options) as llm:
        for ask, output in zip(SHAPES, llm.generate(prompts, GREEDY, use_tqdm=False), strict=True):
            assert_ranked(oracle, ask, output, schedule)
    gates = dividing(tmp_path, oracle, layers=(4, 6))
    with running(folder, gates.options, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    exits = [assert_gated(oracle, *told, gates) for told in zip(SHAPES, outputs, strict=True)]
    assert set(exits) == {4, 6, MODEL.layers}


@slow
def test_a_guard_beside_a_drafter(checkpoint, reference, config):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = ENGINE | {"speculative_config": config("eagle")}
    with running(folder, {"layer": LAYER, "align": False, "guard": {"share": 1}}, **options) as llm:
        outputs = llm.generate([ask.to_vllm(oracle) for ask in SHAPES], GREEDY, use_tqdm=False)
        while scheduler_of(llm).has_requests():
            llm.llm_engine.step()
        counts = scheduler_of(llm).statistics.take()
    for ask, output in zip(SHAPES, outputs, strict=True):
        assert_follows(oracle, ask, output.prompt_token_ids, output.outputs[0].token_ids, LAYER, 1)
    assert counts[f"guard_greedy_tokens/{LAYER}/"] == counts[f"guard_tokens/{LAYER}/"] > 0


@pytest.mark.parametrize(
    "method", [pytest.param("eagle", marks=slow), pytest.param("eagle3", marks=slow), "draft_model"]
)
def test_stock(checkpoint, reference, config, told, method):
    folder, answers = checkpoint(MODEL), []
    oracle = reference(folder)
    options = ENGINE | {"speculative_config": config(method), "enable_prefix_caching": True}
    for vtw in (None, {"layer": MODEL.layers}):
        told.drafts.clear()
        with running(folder, vtw, **options) as llm:
            prompts = [ask.to_vllm(oracle) for ask in SHAPES] * 2
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        drafts = {request.split("-")[0]: found for request, found in told.drafts.items()}
        answers.append(
            [
                (output.outputs[0].token_ids, output.num_cached_tokens, drafts[output.request_id])
                for output in outputs
            ]
        )
    assert answers[0] == answers[1]
