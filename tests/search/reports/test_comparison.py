# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What reports say of policies side by side."""

from typing import Any

from vllm_vtw.search.reports.comparison import plain_winner, stages


def policy(plain: bool = False, **changed: float) -> dict[str, Any]:
    return {
        "plain": plain,
        "curves": {task: {"token_change": share} for task, share in changed.items()},
    }


def test_a_plain_baseline_that_wins_is_told():
    policies = {
        "gsearch": policy(ocr=0.2, presence=0.0),
        "FastV, 0.5 from layer 2 on": policy(ocr=0.1, presence=0.0),
        "random, 0.4 from layer 0 on": policy(True, ocr=0.3, presence=0.0),
    }
    result = {"policies": policies, "tasks": {"ocr": {"tokens": 40}, "presence": {"tokens": 20}}}
    assert plain_winner(result, "G-Search", "work") is None
    policies["uniform, 0.4 from layer 0 on"] = policy(True, ocr=0.2, presence=0.0)
    assert plain_winner(result, "G-Search", "work") is None, "no better, and no worse"
    policies["resolution, 0.5 of width and height"] = policy(True, ocr=0.1, presence=0.15)
    assert plain_winner(result, "G-Search", "work") == (
        "On this data, a plain baseline changes answers less than G-Search at no more work: "
        '"resolution, 0.5 of width and height" changes 15.0% of 20 answer tokens on its worst task, '
        "presence, and G-Search 20.0% of 40 answer tokens on its worst task, ocr."
    )


def test_what_is_kept_in_words():
    kept = [{"layer": 0, "keep": 0.5}, {"layer": 9, "keep": 0.0}]
    assert (
        stages({"stages": kept, "ranking": "uniform"}) == "0.5 from layer 0 on, 0 from layer 9 on (uniform)"
    )
    assert stages({"stages": kept[1:], "ranking": None}) == "0 from layer 9 on"
    assert stages({"stages": [], "ranking": None}) == "all"
    assert stages({"stages": [], "ranking": None, "visual_tokens": 0.25}) == "all, but there are 0.25 as many"
