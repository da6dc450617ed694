# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Families on the way of a CUDA machine, on the stand-ins of `static_graphs`: run by `test_workers.py`."""

import pytest

from tests.engine import static_graphs
from tests.engine.engines import running
from tests.families.checkpoints import LAYERS
from tests.families.requests import FAMILIES, GREEDY, asks, assert_answers, engine
from tests.families.vllm_only import VISUAL_TOKENS


@pytest.mark.parametrize("name", FAMILIES)
def test_answers(family_checkpoint, oracle, monkeypatch, tmp_path, name):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    family, layer = FAMILIES[name], LAYERS // 2
    prompts = [ask.to_vllm() for ask in asks(family).values()]
    options = engine(family, enforce_eager=False, max_num_seqs=8)
    with running(family_checkpoint(name), {"layer": layer, "align": False}, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    if name in VISUAL_TOKENS:
        # Stock vLLM cannot give the oracle its embeddings here; `test_families.py` checks answers with it.
        plain = options | {"compilation_config": {"cudagraph_mode": "NONE"}}
        with running(family_checkpoint(name), {"layer": layer, "align": False}, **plain) as llm:
            without = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [out.outputs[0].token_ids for out in outputs] == [out.outputs[0].token_ids for out in without]
    else:
        assert_answers(oracle(name), family, outputs, layer, 1)
    assert static_graphs.replays["FULL", 8] > 0
