# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What compiled code gets of models with M-RoPE, and what is refused of them and of deepstack."""

import json
import logging
from collections import defaultdict
from typing import Any

import pytest
import torch
from vllm.compilation.counter import compilation_counter
from vllm.engine.arg_utils import EngineArgs

from tests.engine.engines import running
from tests.engine.test_ranked import written
from tests.families.checkpoints import LAYERS
from tests.families.requests import (
    FAMILIES,
    FIRST,
    GREEDY,
    asks,
    assert_answers,
    assert_ranked_answers,
    engine,
    shape,
    slow,
)
from vllm_vtw.policy import Policy, Stage


def configure(folder, vtw, **options):
    arguments = {"model_impl": "vtw", "additional_config": {"vtw": vtw}, "dtype": "float32", **options}
    return EngineArgs(str(folder), **arguments).create_engine_config()


class Spy:
    """A segment that records the positions of each call: their number of tokens and their strides."""

    def __init__(self, segment: Any) -> None:
        self.segment, self.layer_names = segment, segment.layer_names
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, positions: torch.Tensor, *others: Any) -> Any:
        self.seen.append((positions.shape[-1], positions.stride()))
        return self.segment(positions, *others)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param("qwen2_5_vl", {LAYERS // 2: 0.0}, marks=slow),
        pytest.param("qwen3_vl", {LAYERS // 2: 0.0}, marks=slow),
        pytest.param("glm4v", {LAYERS // 2: 0.0}, marks=slow),
        pytest.param("qwen2_5_vl", {2: 0.5, 4: 0.1}, marks=slow),
    ],
)
def test_compiled_code_always_gets_the_strides_that_it_was_made_for(
    family_checkpoint, oracle, monkeypatch, tmp_path, name, schedule
):
    """In steps in which no tokens leave, some do, and all do. A ranked prompt takes one step."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    family, is_ranked = FAMILIES[name], len(schedule) > 1
    asked, chunk = asks(family), 512 if is_ranked else 32
    vtw = written(tmp_path, schedule, shape(name)) if is_ranked else {"layer": LAYERS // 2, "align": False}
    options = engine(family, enforce_eager=False, max_num_batched_tokens=chunk, max_num_seqs=4)
    with running(family_checkpoint(name), vtw, **options) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        (decoder,) = (
            module.staged_decoder
            for module in worker.model_runner.model.modules()
            if hasattr(module, "staged_decoder")
        )
        spies = {stage: Spy(segment) for stage, segment in decoder.segments.items()}
        decoder.segments = spies
        steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
        run = decoder._run

        def counted(
            stage: int, step: Any, positions: torch.Tensor, hidden: torch.Tensor, *others: Any
        ) -> Any:
            steps[stage].append((positions.shape[-1], len(hidden)))
            return run(stage, step, positions, hidden, *others)

        decoder._run = counted
        warm = compilation_counter.clone()
        llm.generate(asked[FIRST].to_vllm(), GREEDY, use_tqdm=False)
        outputs = llm.generate([ask.to_vllm() for ask in asked.values()], GREEDY, use_tqdm=False)
        assert compilation_counter == warm
    if is_ranked:
        assert_ranked_answers(oracle(name), family, outputs, schedule)
    else:
        assert_answers(oracle(name), family, outputs, LAYERS // 2, 1)
    assert steps.keys() == set(range(1, len(schedule) + 1))
    for stage, seen in steps.items():
        assert len({step for step in seen if step[1] == step[0]}) > 2
        assert len({step for step in seen if 0 < step[1] < step[0]}) > 2
        assert is_ranked or any(kept == 0 for _, kept in seen)
        assert [count for count, _ in spies[0].seen] == [count for count, _ in seen]
        assert [count for count, _ in spies[stage].seen] == [kept for _, kept in seen if kept]
    assert {strides for spy in spies.values() for _, strides in spy.seen} == {(chunk + 1, 1)}


def test_code_for_one_number_of_tokens_is_refused(family_checkpoint):
    family, options = FAMILIES["qwen2_5_vl"], {"compilation_config": {"compile_sizes": [8]}}
    configure(family_checkpoint("qwen2_5_vl"), {"layer": 3}, **engine(family))
    with pytest.raises(ValueError, match="remove compile_sizes from --compilation-config"):
        configure(family_checkpoint("qwen2_5_vl"), {"layer": 3}, **engine(family, **options))


def test_the_log_says_that_frames_are_withdrawn_by_blocks(family_checkpoint, caplog):
    logging.getLogger("vllm.vtw").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm.vtw"):
        for align in (True, False):
            caplog.clear()
            options = engine(FAMILIES["qwen3_vl"], enable_prefix_caching=align)
            with running(family_checkpoint("qwen3_vl"), {"layer": 3, "align": align}, **options):
                said = (
                    "of each frame of a video, which stands between timestamps, up to 62 visual tokens stay"
                )
                assert (said in caplog.text) == align
    logging.getLogger("vllm.vtw").removeHandler(caplog.handler)


def test_layers_with_visual_features_keep_visual_tokens(family_checkpoint, tmp_path):
    folder, options = family_checkpoint("qwen3_vl"), engine(FAMILIES["qwen3_vl"])
    configure(folder, {"layer": 2}, **options)
    with pytest.raises(
        ValueError, match=r"integer from 2 to 6, the number of decoder layers\. The model adds visual"
    ):
        configure(folder, {"layer": 1}, **options)
    file = tmp_path / "policy.json"
    model = {"model_type": "qwen3_vl", "num_hidden_layers": 6, "hidden_size": shape("qwen3_vl").hidden}
    file.write_text(json.dumps(Policy((Stage(1, 0.0),)).to_json(model)))
    with pytest.raises(ValueError, match="the first stage may begin at layer 2"):
        configure(folder, {"policy": str(file)}, **options)
