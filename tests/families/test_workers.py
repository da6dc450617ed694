# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Families on two workers, and under model runner V2 with compilation and CUDA graphs."""

from typing import Any

import pytest

from tests.engine.engines import running
from tests.engine.test_runner_v2 import run
from tests.engine.test_workers import PIPELINE, two_cores
from tests.families.checkpoints import LAYERS
from tests.families.requests import FAMILIES, GREEDY, asks, assert_answers, engine

pytestmark = pytest.mark.slow
__all__ = ["two_cores"]
WITHOUT_PIPELINE = ("idefics3", "smolvlm")
"""vLLM has no pipeline parallelism for them."""
CASES = [(name, "tensor") for name in FAMILIES]
CASES += [(name, "pipeline") for name in FAMILIES if name not in WITHOUT_PIPELINE]
CASES += [("qwen3_vl_moe", "experts"), ("glm4v_moe", "experts")]
OPTIONS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": PIPELINE,
    "experts": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "worker_extension_cls": "tests.families.own_experts.WorkerExtension",
    },
}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_workers(family_checkpoint, oracle, two_cores, name, kind):
    family, layer = FAMILIES[name], LAYERS // 2
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    options = engine(family, **OPTIONS[kind])
    with running(family_checkpoint(name), {"layer": layer, "align": False}, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        if kind == "experts":
            assert llm.collective_rpc("workers_of_experts") == [2, 2]
    assert_answers(oracle(name), family, outputs, layer, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs(name):
    run("static_graphs", f"../families/graph_corners.py::test_answers[{name}]")
