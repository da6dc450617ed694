# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Draws scenes: coloured shapes on a grid, and a row of the grid with a rendered string."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

GRID, CELL = 4, 24
SIZE = GRID * CELL
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 80, 200),
    "yellow": (225, 200, 20),
    "purple": (148, 80, 189),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
# The characters of strings. There are no digits, whose tokens are numbers, and no letters that name a choice
# (A to D) or are too wide.
CHARACTERS = "EFHKLMNPRTUVXY"
LETTER_WIDTH = SIZE // 6


@dataclass(frozen=True)
class Item:
    """An object of a scene.

    Attributes:
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
        row: The row of the grid, from 0 at the top.
        column: The column of the grid, from 0 at the left.
    """

    colour: str
    shape: str
    row: int
    column: int

    @property
    def cell(self) -> int:
        """The number of its cell in reading order, from 1 on."""
        return self.row * GRID + self.column + 1

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
        items: The objects, in reading order.
        text: The string.
        text_row: The row of the grid that the string is in. It has no objects.
        text_left: The pixels to the left of the string.
    """

    items: tuple[Item, ...]
    text: str
    text_row: int
    text_left: int

    @classmethod
    def random(cls, rng: Random) -> "Scene":
        """Draws a scene at random."""
        text_row = rng.randrange(GRID)
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(3, 6)))
        cells = [(row, column) for row in range(GRID) if row != text_row for column in range(GRID)]
        # A scene has few colours and shapes. Otherwise there would be little to count.
        colours = rng.sample(list(COLOURS), rng.randint(2, 4))
        shapes = rng.sample(SHAPES, rng.randint(2, 4))
        items = tuple(
            Item(rng.choice(colours), rng.choice(shapes), row, column)
            for row, column in sorted(rng.sample(cells, rng.randint(4, 8)))
        )
        return cls(items, text, text_row, rng.randint(0, SIZE - LETTER_WIDTH * len(text)))

    def unique(self) -> list[Item]:
        """The objects whose colour and shape no other object has together."""
        names = [item.name for item in self.items]
        return [item for item in self.items if names.count(item.name) == 1]

    def draw(self, rng: Random) -> Image.Image:
        """Draws the image, `SIZE` pixels wide and high.

        Sizes, places within a cell and the background vary at random.
        """
        background = rng.randint(225, 255)
        image = Image.new("RGB", (SIZE, SIZE), (background,) * 3)
        draw = ImageDraw.Draw(image)
        for item in self.items:
            radius = rng.randint(7, 9)
            x = item.column * CELL + CELL // 2 + rng.randint(-2, 2)
            y = item.row * CELL + CELL // 2 + rng.randint(-2, 2)
            draw_shape(draw, item.shape, (x, y), radius, COLOURS[item.colour])
        font = ImageFont.load_default(size=20)
        for number, character in enumerate(self.text):
            x = self.text_left + number * LETTER_WIDTH + LETTER_WIDTH // 2
            place = (x, self.text_row * CELL + CELL // 2 + rng.randint(-1, 1))
            draw.text(place, character, fill=(60, 60, 60), font=font, anchor="mm")
        return image


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[int, int], radius: int, fill: tuple[int, int, int]
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    match shape:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle(box, fill=fill)
        case "triangle":
            draw.polygon(((x, y - radius), (x + radius, y + radius), (x - radius, y + radius)), fill=fill)
        case "cross":
            arm = radius // 3
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        case "diamond":
            draw.polygon(((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)), fill=fill)
        case _:
            raise ValueError(f"no shape {shape!r}: one of {', '.join(SHAPES)}")
