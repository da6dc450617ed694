# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Workers that Ray starts: the plugin is in every one of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.platforms.cpu import CpuPlatform

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import SHAPES, assert_follows, running
from tests.engine.gates import assert_gated, dividing

ray = pytest.importorskip("ray", reason="`pip install ray` installs it")
from vllm.v1.executor.ray_executor import RayDistributedExecutor  # noqa: E402
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2  # noqa: E402

pytestmark = pytest.mark.slow
LAYERS = 6
MODEL = SmallLlava(layers=LAYERS)
SHORT = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def pretend_gpus() -> None:
    """vLLM 0.32 places workers by accelerators only, so Ray is told of GPUs that nothing uses."""
    CpuPlatform.ray_device_key = "GPU"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    pretend_gpus()
    environment = {
        "worker_process_setup_hook": pretend_gpus,
        "env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    }
    # An engine that has ended keeps those that it was given.
    ray.init(num_cpus=2, num_gpus=16, include_dashboard=False, runtime_env=environment)
    yield
    ray.shutdown()
    CpuPlatform.ray_device_key = ""


@pytest.mark.parametrize(("v2", "executor"), [("0", RayDistributedExecutor), ("1", RayExecutorV2)])
def test_two_workers(checkpoint, reference, cluster, monkeypatch, tmp_path, v2, executor):
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", v2)
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    options = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "max_num_batched_tokens": 320,
    }
    prompts = [ask.to_vllm(oracle) for ask in SHAPES]
    gates = dividing(tmp_path, oracle, model=MODEL, layers=(2, 4))
    answers = []
    for vtw in (None, {"layer": LAYERS}, {"layer": LAYERS // 2, "align": False}, gates.options):
        with running(folder, vtw, **options) as llm:
            assert type(llm.llm_engine.engine_core.engine_core.model_executor) is executor
            answers.append(llm.generate(prompts, SHORT, use_tqdm=False))
    stock, full, withdrawn, gated = answers
    left = set()
    for ask, theirs, ours, output, chosen in zip(SHAPES, stock, full, withdrawn, gated, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids, ask.name
        told = ask, output.prompt_token_ids, output.outputs[0].token_ids
        assert_follows(oracle, *told, LAYERS // 2, align_to=1)
        left.add(assert_gated(oracle, ask, chosen, gates, MODEL))
    assert left == {2, 4, LAYERS}
