# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The trained model's tasks: right answers, splits that stay apart, rows equal to single requests."""

import re
from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlavaForConditionalGeneration

from benchmarks.quality import train
from benchmarks.quality.model import (
    MAX_ANSWER_TOKENS,
    PATCH,
    PICTURE_PART,
    SIDE,
    VISUAL_TOKENS,
    config,
    normalised,
    question_part,
    tokenizer,
)
from benchmarks.quality.muon import orthogonal
from benchmarks.quality.packing import IGNORE, Packer, questions
from benchmarks.quality.scenes import CELL, CHARACTERS, COLOURS, GRID, LETTER_WIDTH, SIZE, Scene
from benchmarks.quality.tasks import AUXILIARY_TASKS, TASKS, ask, objects_found, samples
from benchmarks.quality.train import Trainer, logits
from benchmarks.quality.vision import labels, pictures
from benchmarks.small_llava import make_processor

seeds = st.integers(0, 10**9)


def found_by_question(scene: Scene, question: str) -> str:
    """The answer, read from the question's words."""

    def groups(pattern: str) -> tuple[str, ...]:
        match = re.fullmatch(pattern, question)
        return match.groups() if match else ()

    at = {(item.row, item.column): item for item in scene.items}
    readers: dict[str, Callable[..., str]] = {
        r"Is there a (\w+) (\w+)\?": lambda colour, shape: (
            "yes" if any((i.colour, i.shape) == (colour, shape) for i in scene.items) else "no"
        ),
        r"What (\w+) is the object in cell (\d+)\?": lambda kind, cell: getattr(
            at[divmod(int(cell) - 1, GRID)], kind
        ),
        r"How many (\w+) objects are there\?": lambda word: str(
            sum(word in (i.colour, i.shape) for i in scene.items)
        ),
        r"The (\w+ \w+) is where from the (\w+ \w+)\? .*": lambda a, b: side(scene, a, b, question),
        r"(What does the text say\?)": lambda _: scene.text,
        r"What is character (\d+) of the text\?": lambda number: scene.text[int(number) - 1],
        r"Which cell has the (\w+ \w+)\?": lambda name: cell_of(scene, name),
        r"(List every object.)": lambda _: ", ".join(f"{i.colour} {i.shape}" for i in scene.items),
    }
    (answer,) = [read(*words) for pattern, read in readers.items() if (words := groups(pattern))]
    return answer


def cell_of(scene: Scene, name: str) -> str:
    (item,) = [item for item in scene.items if item.name == name]
    return str(item.row * GRID + item.column + 1)


def side(scene: Scene, a: str, b: str, question: str) -> str:
    (first,), (second,) = ([i for i in scene.items if i.name == name] for name in (a, b))
    words = {
        (0, -1): "left of",
        (0, 1): "right of",
        (-1, 0): "above",
        (1, 0): "below",
    }[int(np.sign(first.row - second.row)), int(np.sign(first.column - second.column))]
    (letter,) = re.findall(rf"(\w)\) {words}", question)
    return letter


@given(seeds, st.sampled_from([*TASKS, *AUXILIARY_TASKS]))
def test_answers_are_right(seed, task):
    rng = Random(seed)
    scene = Scene.random(rng)
    question = ask(task, scene, rng)
    if question:
        assert found_by_question(scene, question.text) == question.answer


@given(seeds)
def test_a_scene_keeps_its_places_apart(seed):
    scene = Scene.random(Random(seed))
    places = [(item.row, item.column) for item in scene.items]
    assert places == sorted(set(places))
    assert all(row != scene.text_row for row, _ in places)
    assert 3 <= len(scene.text) <= 6
    assert set(scene.text) <= set(CHARACTERS)


@given(seeds)
def test_a_picture_shows_its_scene(seed):
    rng = Random(seed)
    scene = Scene.random(rng)
    pixels = np.asarray(scene.draw(rng))
    for item in scene.items:
        y, x = (place * CELL + CELL // 2 for place in (item.row, item.column))
        assert tuple(pixels[y, x]) == COLOURS[item.colour]
    text = pixels[scene.text_row * CELL : (scene.text_row + 1) * CELL]
    dark = np.flatnonzero((text < 120).all(axis=2).any(axis=0))
    assert scene.text_left <= dark.min()
    assert dark.max() < scene.text_left + len(scene.text) * LETTER_WIDTH


def pictures_of(asked, count: int) -> set[bytes]:
    return {picture.tobytes() for picture, _ in islice(asked, count)}


@pytest.mark.parametrize("task", TASKS)
def test_splits_stay_apart(words, task):
    test, validation = (pictures_of(samples(split, task), 50) for split in ("test", "validation"))
    assert test == pictures_of(samples("test", task), 50)
    rows = {split: next(Packer(split, words).batches(200)).pixels for split in ("train", "validation")}
    seen = {split: {picture.numpy().tobytes() for picture in pixels} for split, pixels in rows.items()}
    seen["vision"] = {picture.numpy().tobytes() for picture in pictures(200, 0)[0]}
    every = [test, validation, *seen.values()]
    assert all(len(each) > 45 for each in every)
    assert len(set.union(*every)) == sum(map(len, every))


def test_training_rows_go_on_where_they_stopped(words):
    through = list(islice(Packer("train", words).batches(2), 3))
    resumed = next(Packer("train", words).batches(2, start=2))
    assert torch.equal(resumed.pixels, through[2].pixels)
    assert torch.equal(resumed.ids, through[2].ids)
    assert not torch.equal(resumed.ids, through[1].ids)


@given(seeds, st.sampled_from(list(TASKS)))
def test_answers_fit(words, seed, task):
    rng = Random(seed)
    question = ask(task, Scene.random(rng), rng)
    if question:
        length = len(words.encode(f" {question.answer}</s>"))
        assert length <= MAX_ANSWER_TOKENS
        if task == "caption":
            assert 10 <= length - 1 <= 30


def test_the_model_is_small_and_deep(words):
    shape = config(words)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert shape.text_config.num_hidden_layers >= 12
    assert 64 <= shape.image_seq_length == VISUAL_TOKENS <= 144


def test_a_chat_is_the_prompt_of_training(words):
    processor = make_processor(words, SIZE, PATCH)
    content = [{"type": "image"}, {"type": "text", "text": "What does the text say?"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert chat == PICTURE_PART + question_part("What does the text say?")


@given(seeds)
def test_patches_are_labelled_as_their_cells(seed):
    scene = Scene.random(Random(seed))
    found = labels(scene)
    per_cell = SIDE * CELL // SIZE
    assert (found["colour"] > 0).sum() == len(scene.items) * per_cell**2
    assert found["number"].max() == max(len(scene.items), len(scene.text))
    row = scene.text_row * per_cell
    read = dict.fromkeys(zip(found["number"][row], found["character"][row], strict=True))
    assert "".join(CHARACTERS[character - 1] for number, character in read if number) == scene.text


@given(st.lists(st.sampled_from(["red circle", "blue cross", "black square"]), min_size=1, max_size=8))
def test_caption_objects(names):
    answer = ", ".join(names)
    assert objects_found(answer, answer) == 1
    assert objects_found(answer, ", ".join(names[:-1])) == pytest.approx((len(names) - 1) / len(names))
    assert objects_found(answer, f"{answer}, green circle") == pytest.approx(len(names) / (len(names) + 1))


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@given(text=st.text(CHARACTERS, min_size=3, max_size=6))
def test_a_string_is_read_by_the_character(words, text):
    assert len(words.encode(f" {text}")) == 1 + len(text)


@given(st.tuples(st.integers(1, 3), st.integers(2, 24), st.integers(2, 24)), seeds)
def test_muon_brings_singular_values_near_1(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(shape, generator=generator)
    values, made = torch.linalg.svdvals(matrices), torch.linalg.svdvals(orthogonal(matrices))
    # Five iterations reach those that are not a hundred times smaller than the largest together.
    reached = values > 0.02 * matrices.norm(dim=(1, 2))[:, None]
    assert made[reached].min() > 0.3
    assert made.max() < 1.3


def test_a_request_reads_as_a_row_of_training(words):
    batch = next(Packer("validation", words).batches(1))
    rng = Random("validation 0")
    scene = Scene.random(rng)
    scene.draw(rng)
    question = next(questions(scene, rng))
    alone = words.encode(PICTURE_PART + question_part(question.text))
    trained = batch.ids[0, batch.group[0] <= 1].tolist()
    image = words.convert_tokens_to_ids("<image>")
    assert trained[: len(alone) + VISUAL_TOKENS - 1] == [
        token for each in alone for token in [each] * (VISUAL_TOKENS if each == image else 1)
    ]


def test_pixels_are_what_the_processor_makes(words):
    pictures = [image for image, _ in islice(samples("test", "caption"), 3)]
    processor = make_processor(words, SIZE, PATCH)
    made = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    torch.testing.assert_close(normalised(stacked), made)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def made() -> Trainer:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        text = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        return Trainer(nn.ModuleDict({"text": text, "head": nn.Linear(2, 3)}), steps=8)

    def step(trainer: Trainer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        modules: Any = trainer.model
        out = modules["head"](modules["text"]["layers"][0](torch.randn(5, 4, generator=generator)))
        trainer.step(out.square().mean())

    through, stopped, resumed = made(), made(), made()
    for number in range(8):
        step(through, number)
        if number < 5:
            step(stopped, number)
    stopped.save(tmp_path / "state.pt", [{"step": 5}])
    assert resumed.load(tmp_path / "state.pt") == [{"step": 5}]
    for number in range(5, 8):
        step(resumed, number)
    for ours, wanted in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(ours, wanted)
    at_step_5 = next(stopped.model.parameters())
    assert not torch.equal(at_step_5, next(through.model.parameters()))


def test_one_wrong_token_makes_an_answer_wrong(words, monkeypatch):
    batch = next(Packer("validation", words).batches(3))
    belongs = batch.targets != IGNORE
    perfect = 50.0 * nn.functional.one_hot(batch.targets[belongs], len(words)).float()
    monkeypatch.setattr(train, "logits", lambda model, batch: perfect)
    found = train.validate(None, batch)
    assert found.pop("loss") < 1e-3
    assert set(found) >= set(TASKS)
    assert set(found.values()) == {1.0}
    every = [task for tasks in batch.tasks for task in tasks]
    groups = batch.group[belongs].tolist()
    for at in (0, len(groups) - 1):
        task = batch.tasks[0 if at == 0 else -1][groups[at] - 1]
        perfect[at] = -perfect[at]
        assert train.validate(None, batch)[task] == (every.count(task) - 1) / every.count(task)
        perfect[at] = -perfect[at]


def test_a_packed_question_is_answered_as_alone(words):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config(words)).eval()
    batch = next(Packer("validation", words).batches(2))
    with torch.no_grad():
        packed = logits(model, batch)
        at = 0
        for row in range(2):
            for group in range(1, len(batch.tasks[row]) + 1):
                alone = batch.ids[row, (batch.group[row] == 0) | (batch.group[row] == group)]
                wanted = int((batch.targets[row, batch.group[row] == group] != IGNORE).sum())
                out = model(
                    input_ids=alone[None], pixel_values=normalised(batch.pixels[row : row + 1])
                ).logits[0]
                torch.testing.assert_close(
                    packed[at : at + wanted], out[-wanted - 1 : -1], rtol=1e-3, atol=1e-4
                )
                at += wanted
    assert at == len(packed)
    assert (batch.ids == model.config.image_token_id).sum() == 2 * VISUAL_TOKENS
