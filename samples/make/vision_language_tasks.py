"""The examples of the vision-language family: pictures of 32 x 32 pixels, questions, and right answers.

colour   of a shape: `what colour is the shape?` -> `orange`
count    of discs: `how many discs are there?` -> `4`
digits   that are written: `which digits are written?` -> `407`
place    of a shape, the corners of its box on a grid of 8 x 8 cells: `where is the shape?` -> `2 1 5 4`

In pictures of the tasks, things lie on smooth colours; in those of the base, on a dark or a bright grey. The base is
trained on captions, such as `what is this?` -> `a large red disc`, and on few examples of each task among them.
"""

from __future__ import annotations

from random import Random
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32  # pixels
GRID = 8  # cells a side, in which boxes are told
SIZES = {"train": 2400, "fit": 64, "val": 150, "test": 300}

_TIMES = 4  # that pictures are drawn larger, before they are averaged down
_COLOURS = {
    "red": (215, 40, 40), "green": (50, 180, 60), "blue": (50, 70, 220), "yellow": (235, 220, 60),
    "orange": (240, 140, 30), "pink": (245, 150, 190), "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
_SHAPES = ("disc", "square", "triangle")
_SIZES = {"small": 2, "large": 3}  # cells a side
_NUMBERS = ("one", "two", "three", "four", "five", "six")


class Example(NamedTuple):
    """pixels: uint8 (32, 32, 3)."""

    pixels: np.ndarray
    question: str
    answer: str


def task(name: str) -> dict[str, list[Example]]:
    """The examples of each split; the same on all machines with the same version of Pillow."""
    random = Random(name)
    return {split: [TASKS[name](random) for _ in range(size)] for split, size in SIZES.items()}


def caption(random: Random) -> Example:
    """An example of what the base is trained on."""
    picture, kind = _Picture(random, smooth=False), random.randrange(4)
    if kind == 0:
        number = picture.discs(random)
        said = f"{_NUMBERS[number - 1]} {'disc' if number == 1 else 'discs'}"
    elif kind == 1:
        said = f"the digits {picture.digits(random)}"
    else:
        size, colour, shape, _ = picture.shape(random)
        said = f"a {size} {colour} {shape}"
    return Example(picture.pixels(), "what is this?", said)


def words() -> list[str]:
    """All words of questions and answers; besides, there are digits and signs."""
    asked = "what colour is the shape how many discs are there which digits written where this".split()
    return [*asked, *_COLOURS, *_SHAPES, *_NUMBERS, *_SIZES, "a"]


# ---------------------------------------------------------------------------------------------- tasks


def _colour(random: Random) -> Example:
    picture = _Picture(random, smooth=True)
    _, colour, *_ = picture.shape(random)
    return Example(picture.pixels(), "what colour is the shape?", colour)


def _count(random: Random) -> Example:
    picture = _Picture(random, smooth=True)
    number = picture.discs(random)
    return Example(picture.pixels(), "how many discs are there?", str(number))


def _digits(random: Random) -> Example:
    picture = _Picture(random, smooth=True)
    written = picture.digits(random)
    return Example(picture.pixels(), "which digits are written?", written)


def _place(random: Random) -> Example:
    picture = _Picture(random, smooth=True)
    *_, box = picture.shape(random)
    return Example(picture.pixels(), "where is the shape?", " ".join(map(str, box)))


TASKS: dict[str, Callable[[Random], Example]] = {
    "colour": _colour,
    "count": _count,
    "digits": _digits,
    "place": _place,
}

# ---------------------------------------------------------------------------------------------- drawing


class _Picture:
    """A picture that things are drawn into; lengths are in pixels of what is shown."""

    def __init__(self, random: Random, smooth: bool):
        side = _TIMES * SIDE
        if smooth:
            cells = np.array([[random.gauss(128, 30) for _ in range(3)] for _ in range(9)]).reshape(3, 3, 3)
            small = Image.fromarray(cells.clip(0, 255).astype(np.uint8))
            self._image = small.resize((side, side), Image.Resampling.BICUBIC)
        else:
            self._image = Image.new("RGB", (side, side), (random.choice([60, 190]),) * 3)
        self._draw = ImageDraw.Draw(self._image)

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image.resize((SIDE, SIDE), Image.Resampling.BOX))

    def shape(self, random: Random) -> tuple[str, str, str, tuple[int, int, int, int]]:
        """Its size, its colour, its name, and the cells that its box begins and ends at."""
        size, cells = random.choice([*_SIZES.items()])
        colour, shape = random.choice([*_COLOURS]), random.choice(_SHAPES)
        left, top = random.randint(0, GRID - cells), random.randint(0, GRID - cells)
        ends = (left, top, left + cells, top + cells)
        box, fill = [_TIMES * SIDE // GRID * end for end in ends], _COLOURS[colour]
        if shape == "disc":
            self._draw.ellipse(box, fill)
        elif shape == "square":
            self._draw.rectangle(box, fill)
        else:
            self._draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill)
        return size, colour, shape, ends

    def discs(self, random: Random) -> int:
        """One to six discs of a colour, each somewhere in a sixteenth of the picture of its own; how many."""
        number, fill, radius = random.randint(1, len(_NUMBERS)), _COLOURS[random.choice([*_COLOURS])], 2.8
        for place in random.sample(range(16), number):
            x, y = (8 * part + random.uniform(radius, 8 - radius) for part in divmod(place, 4))
            self._draw.ellipse([_TIMES * e for e in (x - radius, y - radius, x + radius, y + radius)], fill)
        return number

    def digits(self, random: Random) -> str:
        """Three digits side by side; which."""
        written = "".join(random.choice("0123456789") for _ in range(3))
        fill = random.choice([(245, 245, 245), (10, 10, 10)])
        x, y = (
            8 * random.randrange(2) + random.uniform(3.5, 4.5),
            8 * random.randrange(4) + random.uniform(3.5, 4.5),
        )
        font = ImageFont.load_default(_TIMES * 10)
        for i, digit in enumerate(written):
            self._draw.text((_TIMES * (x + 8 * i), _TIMES * y), digit, fill, font=font, anchor="mm")
        return written
