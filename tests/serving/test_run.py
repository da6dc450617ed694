"""The order of runs, and what servers and clients are told."""

import argparse
import json
from collections import Counter
from contextlib import contextmanager

import pytest

from benchmarks.server import ServerError
from benchmarks.serving.run import by_engine, palindromes, why
from benchmarks.serving.sweeps import SETUPS, Engine, Point
from benchmarks.serving.workload import Workload, write_image_set

POINTS = [
    (number, Point("sweep", str(number), Workload(1, 1, 1), Engine(1), layers))
    for number, layers in ((3, (8, 4)), (5, (8,)))
]


@pytest.mark.parametrize("resident", [True, False])
def test_there_and_back(resident):
    started: list[int | None] = []
    running: set[int | None] = set()
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
        assert sides == [None, *sorted(point.layers), *sorted(point.layers, reverse=True), None]
    if resident:
        assert (most, started) == (3, [None, 4, 8])
        assert [number for number, _ in turns] == [3] * 6 + [5] * 4
    else:
        assert (most, started) == (1, [None, 4, 8, 8, 4, None])


@pytest.mark.parametrize("name", SETUPS)
def test_points_can_be_served(name):
    setup = SETUPS[name]()
    options = dict(option.removeprefix("--").partition("=")[::2] for option in setup.options)
    images = json.loads(options["limit-mm-per-prompt"])["image"]
    labels = set()
    for point in setup.points:
        workload = point.workload
        template = 20
        tokens = workload.images * setup.model.visual_tokens + workload.text + template + workload.output
        assert tokens <= int(options["max-model-len"])
        assert workload.images <= images
        assert all(0 < layer < setup.model.layers for layer in point.layers)
        assert workload.requests % workload.questions == 0
        labels.add((point.sweep, point.value))
    assert len(labels) == len(setup.points)
    for engine, points in by_engine(setup.points):
        assert all(setup.points[number] is point and point.engine == engine for number, point in points)
    numbers = [number for _, points in by_engine(setup.points) for number, _ in points]
    assert sorted(numbers) == list(range(len(setup.points)))


def test_small_setup_has_every_sweep_of_the_full_one():
    assert {point.sweep for point in SETUPS["small"]().points} == {
        point.sweep for point in SETUPS["full"]().points
    }


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
