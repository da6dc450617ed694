# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The order of runs, and what servers and clients are told."""

import argparse
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.server import ServerError
from benchmarks.serving.run import Side, by_engine, palindromes, why
from benchmarks.serving.setups import SETUPS
from benchmarks.serving.sweeps import Engine, Point
from benchmarks.serving.workload import Workload, write_image_set
from vllm_vtw.policy import Policy
from vllm_vtw.search.price import RequestTokens

FOUR, EIGHT = (Policy.withdraw_at(layer, 16) for layer in (4, 8))
POINTS = [
    (number, Point("sweep", str(number), Workload(1, 1, 1), Engine(1), policies))
    for number, policies in ((3, (EIGHT, FOUR)), (5, (EIGHT,)))
]


@pytest.mark.parametrize("resident", [True, False])
def test_there_and_back(resident):
    started: list[Side] = []
    running: set[Side] = set()
    most = 0

    @contextmanager
    def start(side):
        nonlocal most
        assert side not in running
        started.append(side)
        running.add(side)
        most = max(most, len(running))
        yield f"server of {side}"
        running.remove(side)

    turns = []
    for number, side, server in palindromes(POINTS, start, resident):
        assert side in running
        assert server == f"server of {side}"
        turns.append((number, side))
    assert not running
    for number, point in POINTS:
        sides = [side for of, side in turns if of == number]
        assert sides == [None, *point.policies, *reversed(point.policies), None]
    if resident:
        assert (most, started) == (3, [None, EIGHT, FOUR])
        assert [number for number, _ in turns] == [3] * 6 + [5] * 4
    else:
        assert (most, started) == (1, [None, EIGHT, FOUR, FOUR, EIGHT, None])


@pytest.mark.parametrize("name", SETUPS)
def test_points_can_be_served(name):
    setup = SETUPS[name]()
    options = dict(option.removeprefix("--").partition("=")[::2] for option in setup.options)
    images = json.loads(options["limit-mm-per-prompt"])["image"]
    labels = set()
    for point in setup.points:
        workload = point.workload
        template = 20
        tokens = (
            workload.images * setup.model.visual_tokens(workload.image_side)
            + workload.text
            + template
            + workload.output
        )
        assert tokens <= int(options["max-model-len"])
        assert workload.images <= images
        model = setup.model.served_as
        for policy in point.policies:
            assert Policy.from_json(policy.to_json(model), model) == policy
        assert workload.requests % workload.questions == 0
        labels.add((point.sweep, point.value))
    assert len(labels) == len(setup.points)
    for engine, points in by_engine(setup.points):
        assert all(setup.points[number] is point and point.engine == engine for number, point in points)
    numbers = [number for _, points in by_engine(setup.points) for number, _ in points]
    assert sorted(numbers) == list(range(len(setup.points)))


def test_small_setup_has_every_sweep_of_the_full_one():
    on_cpu = [*SETUPS["small"]().points, *SETUPS["schedule"]().points]
    assert {point.sweep for point in on_cpu} == {point.sweep for point in SETUPS["full"]().points}


@pytest.mark.parametrize("name", ["schedule", "full"])
def test_vtw_takes_no_more_work_than_the_schedule_beside_it(name):
    setup = SETUPS[name]()
    (point,) = (point for point in setup.points if point.sweep == "schedule")
    ranked, vtw = point.policies
    model, workload = setup.model, point.workload
    request = RequestTokens(model.visual_tokens(), workload.text, workload.output)
    price = model.price(request)
    assert (len(ranked.stages), ranked.ranking, vtw.ranking) == (3, "last-token-attention", None)
    most = price.flops_share(ranked)
    assert most - 1 / model.layers < price.flops_share(vtw) <= most
    assert price.kv_share(ranked) < 1


def test_a_ranked_policy_is_served_from_its_file(tmp_path):
    setup = SETUPS["schedule"]()
    ranked, vtw = setup.points[0].policies
    option = setup.server_options(setup.points[0].engine, ranked, tmp_path)[-1]
    file = json.loads(option.partition("=")[2])["vtw"]["policy"]
    assert Policy.from_json(json.loads(Path(file).read_text()), setup.model.served_as) == ranked
    assert '{"layer": ' in setup.server_options(setup.points[0].engine, vtw, tmp_path)[-1]


@pytest.mark.parametrize("questions", [1, 4])
def test_every_seed_asks_something_else(questions, tmp_path):
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import get_samples
    from vllm.benchmarks.serve import add_cli_args

    from benchmarks.small_llava import CORPUS, make_tokenizer

    make_tokenizer([CORPUS], 512).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    workload = Workload(requests=8, text=12, output=5, questions=questions)

    def asked(seed: int) -> list[tuple[str, str]]:
        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        options = workload.options(28, seed, tmp_path)
        samples = get_samples(
            parser.parse_args(["--backend=openai-chat", "--model=any", *options]), tokenizer
        )
        assert [sample.expected_output_len for sample in samples] == [5] * 8
        found = []
        for sample in samples:
            if questions == 1:
                (image,), text = sample.multi_modal_data, sample.prompt
            else:
                image, part = sample.prompt
                text = part["text"]
            found.append((image["image_url"]["url"], text))
        return found

    one, again, other = asked(1), asked(1), asked(2)
    assert one == again
    assert not {image for image, _ in one} & {image for image, _ in other}
    assert not {text for _, text in one} & {text for _, text in other}
    assert set(Counter(image for image, _ in one).values()) == {questions}


def test_pictures_of_another_size_or_half_written_are_drawn_anew(tmp_path):
    from PIL import Image

    workload = Workload(requests=4, text=1, output=1, questions=2)
    write_image_set(tmp_path, workload, 14, seed=3)
    before = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1)]
    (tmp_path / "0.png").write_bytes(b"half a pic")
    write_image_set(tmp_path, workload, 14, seed=3)
    assert [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1)] == before
    write_image_set(tmp_path, workload, 28, seed=3)
    assert Image.open(tmp_path / "1.png").size == (28, 28)


def test_a_choice_of_nothing_is_told():
    setup = SETUPS["small"]()
    for text in ("K:", "k: 8", "K: 12 of 16"):
        assert [point.sweep for point in setup.chosen(text).points] == ["K"]
    with pytest.raises(ValueError, match="'nothing' is in none of 'K: 8 of 16, K: 12 of 16', "):
        setup.chosen("nothing")


def test_what_a_server_failed_with():
    log = "vllm serve ended with status 1:\nERROR ...\n  File\n(EngineCore) ValueError: No memory\n end"
    assert why(ServerError(log)) == "ValueError: No memory"
    assert (
        why(ServerError("vllm serve did not answer within 600 s:\n"))
        == "vllm serve did not answer within 600 s:"
    )
