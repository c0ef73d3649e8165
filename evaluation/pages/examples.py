"""Examples that two models answer otherwise, and confusion tables, as the report shows them.

Pictures are PNG files in the page itself, small ones, and together no more than a page bears.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Iterable, NamedTuple, Sequence

import numpy as np

from mergeline.evaluation.pages.page import Cell, Table

if TYPE_CHECKING:
    Shown = np.ndarray | str | tuple[np.ndarray, str]

MOST_CLASSES = 30  # of a confusion table
_SIDE = 56  # pixels, of the longer side of a picture
_LARGE_SIDE = 160  # of one that a text asks about
_LONGEST = 600  # characters of a text
_BYTES = 1_500_000  # of all pictures of a page, as it has them


class Example(NamedTuple):
    """One of them. picture: a data URI, or "". caption: what the two models made of it."""

    picture: str
    text: str
    caption: str


class TaskExamples(NamedTuple):
    """Of a task: examples that the first model does better on, and worse, some of `better` and `worse`.

    confusion: what the first model takes examples of each class for; None where there are no classes, or too many.
    """

    task: str
    better: int
    worse: int
    gained: list[Example]
    lost: list[Example]
    confusion: Table | None = None


def example(shown: Shown, caption: str) -> Example:
    """An example that is a picture (uint8, H x W x 3), a text, or both."""
    if isinstance(shown, str):
        return Example("", _shortened(shown), caption)
    if isinstance(shown, tuple):
        return Example(_picture(shown[0], _LARGE_SIDE), _shortened(shown[1]), caption)
    return Example(_picture(shown, _SIDE), "", caption)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _picture(pixels: np.ndarray, side: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(_png(pixels, side)).decode()}"


def _png(pixels: np.ndarray, side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


def within_bounds(found: Iterable[TaskExamples]) -> list[TaskExamples]:
    """With as many pictures a task as a page has room for, the first ones."""
    tasks = list(found)
    return [
        task._replace(gained=_first(task.gained, room), lost=_first(task.lost, room))
        for task in tasks
        for room in [_BYTES // (2 * len(tasks))]
    ]


def _first(examples: list[Example], room: int) -> list[Example]:
    kept = []
    for found in examples:
        room -= len(found.picture)
        if room < 0:
            break
        kept.append(found)
    return kept


def confusion(names: Sequence[str], label_N: np.ndarray, answer_N: np.ndarray) -> Table | None:
    """How many examples of each class (rows) are taken for each (columns), coloured by shares of the row.

    Answers that are no class, as -1 is, stand in a last column. None where there are too many classes.
    """
    count = len(names)
    if count > MOST_CLASSES:
        return None
    known_N = (answer_N >= 0) & (answer_N < count)
    table_CC = np.zeros((count, count + 1), np.int64)
    np.add.at(table_CC, (label_N, np.where(known_N, answer_N, count)), 1)
    columns = [*names, *([] if known_N.all() else ["none of them"])]

    def cell(row_C: np.ndarray, j: int) -> Cell:
        return Cell(str(row_C[j]), 100 * row_C[j] / row_C.sum()) if row_C[j] else Cell("", None)

    rows = [(name, [cell(row_C, j) for j in range(len(columns))]) for name, row_C in zip(names, table_CC)]
    return Table(columns, rows, 0.0, 1.0)
