"""`vtw plan` beside what an engine really holds, at twice its capacity."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams

from benchmarks.small_llava import SmallLlava
from tests.engine.engines import A, Ask, assert_follows, held_blocks, running, scheduler_of, step_until
from vllm_vtw.kv.spec import StageSpec

TEXT, OUTPUT, BLOCK_SIZE = 60, 68, 32
MEMORY = 6 << 20
MODEL = SmallLlava(layers=5, kv_heads=1)


def planned(folder: Path, *options: str) -> dict:
    command = Path(sys.executable).parent / "vtw"
    result = subprocess.run(
        [command, "plan", folder, "--json", *options], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


@pytest.mark.parametrize(("layer", "caching"), [(2, False), (4, True)])
def test_an_engine_holds_what_was_planned(checkpoint, reference, layer, caching):
    folder = checkpoint(MODEL)
    oracle = reference(folder)
    sizes = ["--prompt-tokens", str(TEXT), "--output-tokens", str(OUTPUT), "--block-size", str(BLOCK_SIZE)]
    options = ["--dtype", "float32", "--layer", str(layer), "--kv-memory", str(MEMORY), *sizes]
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layer", "9"], "has to be an integer from 1 to 5"),
        (["--kv-memory", "lots"], "'lots' is not an amount of memory"),
        (["--images", "-1"], "'-1' is not a number"),
        (["--block-size", "0"], "'0' is not a number of tokens from 1 on"),
        (["--layer", "2", "--policy", "file"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_planned_is_said(checkpoint, options, said):
    with pytest.raises(subprocess.CalledProcessError) as error:
        planned(checkpoint(MODEL), *options)
    assert error.value.returncode == 2
    assert said in error.value.stderr


def test_a_model_that_is_not_there_is_said(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        planned(tmp_path / "nowhere")
    assert error.value.returncode == 2
    assert "cannot read a model configuration" in error.value.stderr
