# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Videos that vLLM prunes before the decoder (EVS) and that the plugin withdraws within it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.engine.engines import running
from tests.engine.test_runner_v2 import run
from tests.families.oracle import Encoded
from tests.families.requests import FAMILIES, GREEDY, METADATA, VIDEO, Ask, asks, engine, noise, slow
from tests.families.test_mrope import configure
from vllm_vtw.startup import refusals

RATE = 0.5
GRID = (4, 2, 3)
"""Four pairs of frames, each with two rows of three visual tokens."""


def pruned(encoded: Encoded) -> Encoded:
    """What stays of a prompt with a video: its first frames, and the tokens that changed most since then."""
    first, tokens = encoded.visual[0], torch.tensor(encoded.visual)
    frames = encoded.embeds[tokens].unflatten(0, (GRID[0], -1))
    changed = 1 - cosine_similarity(frames[1:], frames[:-1], dim=-1)
    stays = len(tokens) - int(len(tokens) * RATE) - frames.shape[1]
    kept = torch.cat([torch.ones(frames.shape[1]), torch.zeros(changed.numel())]).bool()
    kept[frames.shape[1] + changed.flatten().topk(stays).indices] = True
    everything = torch.ones(len(encoded.ids), dtype=torch.bool)
    everything[tokens[~kept]] = False
    assert encoded.positions is not None
    positions, behind = encoded.positions[:, everything], first + int(kept.sum())
    # vLLM lets the text behind a pruned video go on from the video's width.
    positions[:, behind:] = positions[0, first] + GRID[2] + torch.arange(positions.shape[1] - behind)
    return replace(
        encoded,
        ids=torch.tensor(encoded.ids)[everything].tolist(),
        embeds=encoded.embeds[everything],
        visual=list(range(first, behind)),
        positions=positions,
    )


def test_answers(family_checkpoint, oracle, monkeypatch):
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    family, layer = FAMILIES["qwen2_5_vl"], 3
    video = (noise(4, 8, 56, 84, 3), METADATA | {"total_num_frames": 8, "frames_indices": list(range(8))})
    ask = Ask(asks(family)[VIDEO].prompt, (), (video,))
    options = engine(family, video_pruning_rate=RATE, enable_prefix_caching=False, max_num_batched_tokens=32)
    encoded = pruned(oracle("qwen2_5_vl").encode(ask.prompt, (), ask.videos))
    answers = {}
    for at in (layer, 6):
        with running(family_checkpoint("qwen2_5_vl"), {"layer": at, "align": False}, **options) as llm:
            # vLLM's CPU runner forgets what the GPU runner sets here once it has loaded the model.
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            worker.model_runner.is_multimodal_pruning_enabled = True
            (output,) = llm.generate([ask.to_vllm()], GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == encoded.ids
        answers[at] = list(output.outputs[0].token_ids)
        logits = oracle("qwen2_5_vl").logits(encoded, answers[at], at, set(encoded.visual))
        assert answers[at] == logits.argmax(-1).tolist()
    assert answers[layer] != answers[6]


@slow
def test_answers_under_v2():
    run("triton_interpreter", "../families/test_evs.py::test_answers")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_vl", "the timestamps between the frames"),
        ("qwen3_vl_moe", "the timestamps between the frames"),
        ("qwen2_5_vl", "vLLM fails with pruned videos on the CPU"),
    ],
)
def test_is_refused(family_checkpoint, name, why):
    options = engine(FAMILIES[name], video_pruning_rate=RATE)
    with pytest.raises(ValueError, match=rf"{why}.*remove --video-pruning-rate 0\.5"):
        configure(family_checkpoint(name), {"layer": 3}, **options)
