# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw plan` beside what an engine really holds, at twice its capacity."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import A, Ask, assert_follows, held_blocks, running, scheduler_of, step_until
from vllm_vtw.commands.cli import main
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Gate, Policy, Stage

TEXT, OUTPUT, BLOCK_SIZE = 60, 68, 32
MEMORY = 6 << 20
MODEL = SmallLlava(layers=5, kv_heads=1)


def vtw_plan(*arguments: str) -> tuple[int, str, str]:
    """The command's status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    command = ["vtw", "plan", *arguments]
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", command):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def planned(folder: Path, *options: str) -> dict:
    status, out, err = vtw_plan(str(folder), "--json", *options)
    assert status == 0, err
    return json.loads(out)


def refused(folder: Path, *options: str) -> str:
    status, out, err = vtw_plan(str(folder), *options)
    assert (status, out) == (2, "")
    return err


# Blocks hold several pages at K = 1 and 5.
@pytest.mark.parametrize(("layer", "caching"), [(2, False), (4, True), (5, False), (1, True)])
def test_an_engine_holds_what_was_planned(checkpoint, reference, layer, caching):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    sizes = ["--prompt-tokens", str(TEXT), "--output-tokens", str(OUTPUT), "--block-size", str(BLOCK_SIZE)]
    options = ["--dtype", "float32", "--layer", str(layer), "--kv-memory", f"{MEMORY >> 20}MiB", *sizes]
    plan = planned(folder, *options, *([] if caching else ["--no-enable-prefix-caching"]))
    fit = plan["max_sequences"]["vtw"]
    assert fit > 10
    # The picture begins inside a block, which is what a plan reckons with.
    ask = Ask("", "x" * 7 + "<image>" + "x" * (TEXT - 7), (A,))
    answer = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    most = 0
    held: set[int] = set()
    preempted: set[str] = set()
    # One step takes every prompt, so that the answers grow side by side and reach full length together.
    engine = {"kv_cache_memory_bytes": MEMORY, "max_num_seqs": 64, "max_num_batched_tokens": 1 << 14}
    with running(folder, {"layer": layer}, enable_prefix_caching=caching, **engine) as llm:
        scheduler = scheduler_of(llm)
        config = scheduler.kv_cache_config
        assert [group["layers"] for group in plan["groups"]] == [
            len(group.layer_names) for group in config.kv_cache_groups
        ]
        assert [group["stage"] for group in plan["groups"]] == [
            group.kv_cache_spec.stage if isinstance(group.kv_cache_spec, StageSpec) else 0
            for group in config.kv_cache_groups
        ]
        page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        for number in range(2 * fit):
            # Each has a cache of its own, so that nothing is shared.
            prompt = ask.to_vllm(oracle) | {"cache_salt": str(number)}
            llm.llm_engine.add_request(str(number), prompt, answer)

        def look():
            nonlocal most
            # The last token of an answer is never computed.
            complete = [r.request_id for r in scheduler.running if r.num_tokens == plan_tokens - 1]
            most = max(most, len(complete))
            preempted.update(r.request_id for r in scheduler.running if r.num_preemptions)
            blocks = held_blocks(llm)
            for request in complete:
                held.add(sum(map(len, blocks[request])) * plan["layers_per_group"] * page)

        plan_tokens = TEXT + 100 + OUTPUT
        outputs = step_until(llm, lambda: not llm.llm_engine.has_unfinished_requests(), look)
    assert preempted
    assert len(outputs) == 2 * fit
    assert {len(output.prompt_token_ids) for output in outputs.values()} == {TEXT + 100}
    assert most == fit
    assert held == {plan["kv_bytes_per_request"]["vtw"]}
    for output in outputs.values():
        assert output.outputs[0].token_ids == outputs["0"].outputs[0].token_ids
    ids = outputs["0"].outputs[0].token_ids
    align_to = BLOCK_SIZE if caching else 1
    assert_follows(oracle, ask, outputs["0"].prompt_token_ids, ids, layer, align_to)


def test_a_ranked_policy_is_planned(checkpoint, tmp_path):
    folder, file = checkpoint(MODEL), tmp_path / "policy.json"
    policy = Policy((Stage(1, 0.5), Stage(3, 0.001), Stage(4, 0.0)))
    shape = {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden}
    file.write_text(json.dumps(policy.to_json(shape)))
    plan = planned(folder, "--policy", str(file), "--images", "3", "--prompt-tokens", "60")
    assert [stage["tokens_held"] for stage in plan["stages"]] == [188 + held for held in (300, 150, 1, 0)]
    assert (
        "visual tokens by the ranking 'last-token-attention'"
        in vtw_plan(str(folder), "--policy", str(file))[1]
    )


def test_requests_that_keep_everything_are_planned(checkpoint, tmp_path):
    folder, file = checkpoint(MODEL), tmp_path / "policy.json"
    shape = {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden}
    policy = Policy((Stage(0, 0.5), Stage(3, 0.1)), ranked_by="uniform", tasks={"ocr": MODEL.layers})
    file.write_text(json.dumps(policy.to_json(shape)))
    plan = planned(folder, "--policy", str(file), "--images", "1", "--prompt-tokens", "60")
    assert [stage["tokens_held"] for stage in plan["stages"]] == [188 + held for held in (50, 10)]
    (stays,) = plan["exits"]
    assert (stays["layer"], stays["tasks"]) == (MODEL.layers, ["ocr"])
    assert (
        stays["kv_ratio"] >= 1 > plan["kv_bytes_per_request"]["vtw"] / plan["kv_bytes_per_request"]["stock"]
    )


def test_gates_are_planned_for_every_exit(checkpoint, tmp_path):
    folder, file = checkpoint(MODEL), tmp_path / "policy.json"
    policy = Policy((Stage(2, 0.0), Stage(4, 0.0)), Gate("gates.safetensors", "", (0.0, 0.0)))
    shape = {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden}
    file.write_text(json.dumps(policy.to_json(shape)))
    options = ("--images", "2", "--prompt-tokens", "60")
    plan = planned(folder, "--policy", str(file), *options)
    assert [stage["tokens_held"] for stage in plan["stages"]] == [388, 188, 188]
    first, second, never = plan["exits"]
    assert first["kv_bytes_per_request"] == plan["kv_bytes_per_request"]["vtw"]

    def blocks(exit_stage: int) -> int:
        """The blocks of all groups if visual tokens leave at this stage."""
        held = [(388 if group["stage"] < exit_stage else 188, group["pages"]) for group in plan["groups"]]
        return sum(-(-tokens // (16 * pages)) for tokens, pages in held)

    for found, stage in ((first, 1), (second, 2), (never, 3)):
        expected = plan["kv_bytes_per_request"]["vtw"] * blocks(stage) / blocks(1)
        assert found["kv_bytes_per_request"] == pytest.approx(expected)
    said = vtw_plan(str(folder), "--policy", str(file), *options)[1]
    assert "every visual token at layer 2, if the gate there says so" in said
    assert f"If they stay: {never['kv_bytes_per_request'] / 2**20:.1f} MiB" in said


def test_layers_to_choose_from_are_planned_one_by_one(checkpoint, tmp_path):
    """Each takes what the policy with that one default takes."""
    folder, file = checkpoint(MODEL), tmp_path / "policy.json"
    shape = {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden}
    options = ("--images", "2", "--prompt-tokens", "60", "--kv-memory", "32MiB")
    stages = (Stage(2, 0.0), Stage(4, 0.0))
    by_default = {}
    for layer in (2, 4, MODEL.layers):
        file.write_text(json.dumps(Policy(stages, layer=layer).to_json(shape)))
        by_default[layer] = planned(folder, "--policy", str(file), *options)
    file.write_text(
        json.dumps(Policy(stages, layer=4, tasks={"yes/no": 2, "ocr": 4, "vqa": 4}).to_json(shape))
    )
    plan = planned(folder, "--policy", str(file), *options)
    assert [exit_["layer"] for exit_ in plan["exits"]] == [2, 4, MODEL.layers]
    assert [exit_["tasks"] for exit_ in plan["exits"]] == [["yes/no"], ["ocr", "vqa"], []]
    for exit_ in plan["exits"]:
        of_default = by_default[exit_["layer"]]
        assert exit_["kv_bytes_per_request"] == of_default["kv_bytes_per_request"]["vtw"]
        assert exit_["max_sequences"] == of_default["max_sequences"]["vtw"]
    assert [stage["tokens_held"] for stage in by_default[MODEL.layers]["stages"]] == [388] * 3
    assert plan["groups"] == by_default[2]["groups"]
    said = vtw_plan(str(folder), "--policy", str(file), *options)[1]
    assert "at layer 4, the default:" in said
    assert "If they leave at layer 4 (task ocr, vqa): " in said
    chosen = planned(folder, "--layers", f"4,2,{MODEL.layers}", *options)
    assert chosen == by_default[MODEL.layers]
    file.write_text(json.dumps(Policy(stages[:1], tasks={"yes/no": 2, "ocr": MODEL.layers}).to_json(shape)))
    of_one = planned(folder, "--policy", str(file), *options)
    assert [(exit_["layer"], exit_["tasks"]) for exit_ in of_one["exits"]] == [
        (2, ["yes/no"]),
        (MODEL.layers, ["ocr"]),
    ]
    assert "nothing by default" in vtw_plan(str(folder), "--layers", f"2,{MODEL.layers}", *options)[1]


def test_shares_to_choose_from_are_planned_one_by_one(checkpoint, tmp_path):
    folder, file = checkpoint(MODEL), tmp_path / "policy.json"
    shape = {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden}
    options = ("--images", "2", "--prompt-tokens", "60", "--kv-memory", "32MiB", "--policy", str(file))
    policy = Policy((Stage(0, 0.5),), ranked_by="uniform", offered_keeps=(0.25, 0.5))
    file.write_text(json.dumps(policy.to_json(shape)))
    plan = planned(folder, *options)
    assert [share["keep"] for share in plan["shares"]] == [0.25, 0.5, 1.0]
    assert plan["shares"][1]["kv_bytes_per_request"] == plan["kv_bytes_per_request"]["vtw"]
    assert plan["shares"][2]["kv_bytes_per_request"] == plan["kv_bytes_per_request"]["stock"]
    file.write_text(json.dumps(Policy((Stage(0, 0.25),), ranked_by="uniform").to_json(shape)))
    fewer = planned(folder, *options)
    assert fewer["shares"] == []
    assert plan["shares"][0]["kv_bytes_per_request"] == fewer["kv_bytes_per_request"]["vtw"]
    file.write_text(json.dumps(policy.to_json(shape)))
    assert "If a request keeps 0.25 of them: " in vtw_plan(str(folder), *options)[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layer", "9"], "error: --layer 9: has to be an integer from 1 to 5"),
        (["--layers", "2,9"], "error: --layers 9: has to be an integer from 1 to 5"),
        (["--layers", "2;4"], "'2;4' is not a list of layers, like 8,16,24"),
        ([], "no withdrawal layer is published for this model, so --layer or --policy has to be set"),
        (["--image-size", "wide"], "'wide' is not a width and height in pixels, like 1024x768"),
        (["--kv-memory", "lots"], "'lots' is not an amount of memory"),
        (["--kv-memory", "8X"], "'8X' is not an amount of memory"),
        (
            ["--layer", "2", "--prompt-tokens", "0", "--images", "0", "--output-tokens", "0"],
            "a request without tokens",
        ),
        (["--images", "-1"], "'-1' is not a number"),
        (["--block-size", "0"], "'0' is not a number of tokens of at least 1"),
        (["--layer", "2", "--policy", "file"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_planned_is_said(checkpoint, options, said):
    assert said in refused(checkpoint(MODEL), *options)


def test_unknown_options_show_the_command_s_own_usage(checkpoint):
    said = refused(checkpoint(MODEL), "--layer", "2", "--blocks", "3")
    assert said.startswith("usage: vtw plan")
    assert "unrecognized arguments: --blocks 3" in said


def test_memory_has_the_units_of_vllm(checkpoint):
    folder = checkpoint(MODEL)
    sizes = {"3G": 3 << 30, "3g": 3 * 10**9, "5000000": 5_000_000, "1.5GiB": 3 << 29}
    for text, size in sizes.items():
        assert planned(folder, "--layer", "2", "--kv-memory", text)["kv_memory_bytes"] == size


def test_align_can_be_planned(checkpoint):
    folder = checkpoint(MODEL)
    held = [
        planned(folder, "--layer", "2", *options)["stages"][1]["tokens_held"]
        for options in ([], ["--align", "true"], ["--align", "false"], ["--no-enable-prefix-caching"])
    ]
    # 64 text and 128 output tokens, and at least 80 of 100 visual tokens leave in whole blocks.
    assert held == [212, 212, 192, 192]


def test_a_model_that_is_not_there_is_said(tmp_path):
    assert "there is no such file or folder" in refused(tmp_path / "nowhere")


def test_people_read_the_same_numbers(checkpoint):
    folder = checkpoint(MODEL)
    fit = planned(folder, "--layer", "3")["max_sequences"]
    status, out, _ = vtw_plan(str(folder), "--layer", "3")
    assert status == 0
    assert out.splitlines()[-1].split() == [
        *("requests", "in", "8", "GiB"),
        str(fit["stock"]),
        str(fit["vtw"]),
        "x",
        f"{fit['vtw'] / fit['stock']:.2f}",
    ]


def configured(folder: Path, **changes) -> Path:
    """A LLaVA's configuration, changed."""
    parts = {
        "text_config": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        "vision_feature_select_strategy": "default",
    }
    content = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]} | parts | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens"),
    [
        ({"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}, "default", 576),
        ({"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14}, "default", 256),
        ({"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14}, "full", 257),
        ({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, "full", 729),
    ],
)
def test_tokens_of_an_image_are_those_of_vllm(tmp_path, vision, strategy, tokens):
    folder = configured(tmp_path, vision_config=vision, vision_feature_select_strategy=strategy)
    hf_config = AutoConfig.from_pretrained(folder)
    encoder = get_vision_encoder_info(hf_config)
    size = {"image_width": vision["image_size"], "image_height": vision["image_size"]}
    in_vllm = get_num_selected_vision_tokens(encoder.get_num_image_tokens(**size), strategy)
    assert planned(folder)["request"]["tokens_per_image"] == in_vllm == tokens


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision_config": {"model_type": "pixtral"}},
            "the model's processor cannot tell how many tokens an image has",
        ),
        ({"text_config": {"model_type": "gemma"}}, "the text model is 'gemma'; supported are llama, "),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": 4096}},
            "attends over a sliding window, which would count withdrawn tokens",
        ),
        ({"text_config": {"model_type": "nosuch"}}, "cannot read a model configuration"),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "does not support Gemma3ForConditionalGeneration: its layers have sliding windows",
        ),
    ],
)
def test_what_is_not_served_is_not_planned(tmp_path, changes, said):
    assert said in refused(configured(tmp_path, **changes))
