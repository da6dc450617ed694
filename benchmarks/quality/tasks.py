# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Asks questions about a scene, with answers that can be checked exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from benchmarks.quality.scenes import COLOURS, SHAPES, Scene

CHOICES = {"left of": "A", "right of": "B", "above": "C", "below": "D"}


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        task: The name of the task.
        text: The question.
        answer: The only right answer.
    """

    task: str
    text: str
    answer: str


def presence(scene: Scene, rng: Random) -> tuple[str, str]:
    present = {item.name for item in scene.items}
    if rng.random() < 0.5:
        name, answer = rng.choice(sorted(present)), "yes"
    else:
        # Most of these questions name a colour and a shape that the scene has, but not together.
        seen = [f"{a.colour} {b.shape}" for a in scene.items for b in scene.items]
        every = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        absent = [name for name in (seen if rng.random() < 0.7 else every) if name not in present]
        name, answer = rng.choice(absent or [name for name in every if name not in present]), "no"
    return f"Is there a {name}?", answer


def attribute(scene: Scene, rng: Random) -> tuple[str, str]:
    item = rng.choice(scene.items)
    kind = rng.choice(("colour", "shape"))
    return f"What {kind} is the object in cell {item.cell}?", getattr(item, kind)


def counting(scene: Scene, rng: Random) -> tuple[str, str]:
    kind, every = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
    present = [getattr(item, kind) for item in scene.items]
    # Few questions are about what the scene lacks. Otherwise most answers would be 0.
    wanted = rng.choice(sorted(set(present)) if rng.random() < 0.85 else every)
    return f"How many {wanted} objects are there?", str(present.count(wanted))


def relation(scene: Scene, rng: Random) -> tuple[str, str] | None:
    single = scene.unique()
    pairs = [
        (a, b) for a in single for b in single if a is not b and (a.row == b.row or a.column == b.column)
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    if a.row == b.row:
        found = "left of" if a.column < b.column else "right of"
    else:
        found = "above" if a.row < b.row else "below"
    choices = " ".join(f"{letter}) {words}" for words, letter in CHOICES.items())
    return f"The {a.name} is where from the {b.name}? {choices}", CHOICES[found]


def ocr(scene: Scene, rng: Random) -> tuple[str, str]:
    return "What does the text say?", scene.text


def caption(scene: Scene, rng: Random) -> tuple[str, str]:
    return "List every object.", ", ".join(item.name for item in scene.items)


def place(scene: Scene, rng: Random) -> tuple[str, str] | None:
    single = scene.unique()
    if not single:
        return None
    item = rng.choice(single)
    return f"Which cell has the {item.name}?", str(item.cell)


def character(scene: Scene, rng: Random) -> tuple[str, str]:
    number = rng.randrange(len(scene.text))
    return f"What is character {number + 1} of the text?", scene.text[number]


Task = Callable[[Scene, Random], tuple[str, str] | None]
TASKS: dict[str, Task] = {
    function.__name__: function for function in (presence, attribute, counting, relation, ocr, caption)
}
# Tasks that are used only for training. They teach single steps of what relations and strings need.
AUXILIARY_TASKS: dict[str, Task] = {function.__name__: function for function in (place, character)}


def ask(task: str, scene: Scene, rng: Random) -> Question | None:
    """A question of a task about a scene. None if the task has no question about it."""
    asked = (TASKS | AUXILIARY_TASKS)[task](scene, rng)
    return Question(task, *asked) if asked else None


def samples(split: str, task: str) -> Iterator[tuple[Image.Image, Question]]:
    """Yields images with one question each, without end. They are the same for the same split and task."""
    number = 0
    while True:
        rng = Random(f"{split} {task} {number}")
        scene = Scene.random(rng)
        question = ask(task, scene, rng)
        if question:
            yield scene.draw(rng), question
        number += 1


def objects_found(answer: str, said: str) -> float:
    """The fraction of a caption's objects that were named.

    It is the number of objects named, each once, divided by the number of objects in the right answer or in
    the given one, whichever is larger. Made-up objects therefore lower it.

    Args:
        answer: The right caption.
        said: The caption that the model gave.
    """
    wanted, found = answer.split(", "), said.split(", ")
    hits = sum(min(wanted.count(name), found.count(name)) for name in set(wanted))
    return hits / max(len(wanted), len(found))
