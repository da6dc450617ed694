# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw calibrate --keep`: a share of each picture before the decoder, and a K for what is left."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.small_llava import SmallLlava
from tests.search.command import calibrate, found
from tests.search.plain import plain_ranked_logits
from tests.search.test_model import ANSWER, PROMPTS, pictures, sample  # noqa: F401
from vllm_vtw.config import ModelShape, VTWConfig
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.search.vtw.before_decoder import with_fewer_tokens


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("ranking", ["uniform", "diversity"])
def test_every_k_is_what_the_plain_model_gives(llava, pictures, ranking, prompt):  # noqa: F811
    loaded = llava(SmallLlava(layers=4, kv_heads=1, image_side=4))
    plain = AutoModelForImageTextToText.from_pretrained(
        loaded.config._name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = loaded.encode(sample(prompt, pictures), ANSWER)
    answered = loaded.answer(inputs, ANSWER)
    read, at_end = with_fewer_tokens(loaded, answered, ranking, 0.3)
    logits = [*loaded.withdrawn_logits(read, [1, 2, 3]), at_end]
    for layer, ours in zip((1, 2, 3, 4), logits, strict=True):
        keeps = [0.3] * layer + [0.0] * (4 - layer)
        wanted = plain_ranked_logits(plain, inputs.tensors, answered.tokens, keeps, ranking)
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4)


def test_a_share_and_a_k(data, tmp_path):
    options = ("--limit=12", "--layers=6,9", "--keep=0.75")
    ended = calibrate(data, tmp_path, *options, "--max-token-change=1", "--max-answer-kl=99")
    assert ended.status == 0, ended.err
    result = found(tmp_path)
    assert result["layers"] == [6, 9, 12]
    assert result["layer"]["answer"] == 6
    content = json.loads((tmp_path / "policy.json").read_text())
    config = VTWConfig.parse({"policy": content}, ModelShape("llava", "llama", 12, 128), prefix_caching=True)
    assert config.policy == Policy((Stage(0, 0.75), Stage(6, 0.0)), ranked_by="uniform")
    shares = result["prefill_flops_share"]
    assert shares == sorted(shares)
    assert shares[-1] < 0.8
    own, *others = result["policies"].items()
    assert own[0] == "0.75 by uniform, then VTW, K = 6"
    assert own[1]["stages"] == content["stages"]
    assert own[1]["prefill_flops_share"] == shares[0]
    assert {name.split(",")[0] for name, _ in others} == {
        *("VTW", "FastV", "FastV as published", "random", "uniform")
    }
    for task, curve in own[1]["curves"].items():
        assert curve["token_change"] == pytest.approx(result["curves"][task]["token_change"][0])
    assert "75.0 % of each picture" not in (tmp_path / "report.html").read_text()
    assert "25.0 % of each picture" in (tmp_path / "report.html").read_text()
    # With more allowed, nothing but what leaves before the decoder.
    curves = result["curves"].values()
    most = max(curve["token_change"][-1] for curve in curves), max(curve["mean_kl"][-1] for curve in curves)
    budget = f"--max-token-change={most[0]}", f"--max-answer-kl={most[1] + 1e-6}"
    assert calibrate(data, tmp_path, *options, "--resume", *budget).status == 0
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["stages"] == [{"layer": 0, "keep": 0.75}]
    ended = calibrate(data, tmp_path, *options, "--resume", "--max-answer-kl=0")
    assert (ended.status, "so there is no policy file: raise --keep, raise --max-answer-kl" in ended.out) == (
        1,
        True,
    )
    other = calibrate(data, tmp_path, *options[:2], "--keep=0.5", "--resume")
    assert (other.status, "was made with another value of keep" in other.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep=0"], "--keep 0: something has to go into the decoder"),
        (["--keep=1.5"], "'1.5' is not a share"),
        (["--keep=0.5", "--per-task"], "has no layers to choose: remove --per-task"),
        (["--keep=0.5", "--ranking=key-norm"], "invalid choice: 'key-norm'"),
    ],
)
def test_what_cannot_be_kept_is_said(data, tmp_path, options, said):
    ended = calibrate(data, tmp_path, *options)
    assert (ended.status, said in ended.err) == (2, True), ended.err
