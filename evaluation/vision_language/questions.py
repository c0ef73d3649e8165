"""What models are asked about images, and the right answers, made from the rows of a prepared table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Sequence

from mergeline.evaluation.tables import Table
from mergeline.evaluation.text2text.texts import as_text, cells, filled
from mergeline.evaluation.vision_language.boxes import Size, read_box
from mergeline.evaluation.vision_language.metrics import BOX_METRICS, LEAST_PEOPLE, VQA
from mergeline.evaluation.vision_language.settings import Task
from mergeline.merging.errors import UserError


class Questions(NamedTuple):
    """Of each of N examples: the image's file and its size, what is asked, and the right answers."""

    images: list[Path]
    sizes: list[Size]
    asked: list[str]
    targets: list[list[str]]


def questions(task: Task, table: Table, split: str) -> Questions:
    """The examples of a split, in their order.

    Raises:
        UserError: a column is missing, or empty in a row; a right answer is empty, is no box where boxes are compared,
            or stands for too few people where `vqa` counts them.
    """
    images, sizes = pictures(task, table, split)
    names = table.classnames.get(task.target)
    targets = [_answers(task, value, names) for value in table.column(split, task.target)]
    for i, (answers, size) in enumerate(zip(targets, sizes)):
        if wrong := _wrong(task, answers, size):
            raise UserError(f"{table.folder.name}: row {i} of {split}{wrong}")
    return Questions(images, sizes, asked(task, table, split), targets)


def asked(task: Task, table: Table, split: str) -> list[str]:
    """What is asked (raises UserError)."""
    if task.template is not None:
        return filled(task.template, table, split)
    return cells(task.question, table, split)


def pictures(task: Task, table: Table, split: str) -> tuple[list[Path], list[Size]]:
    """The images' files, and their sizes (raises UserError)."""
    found = table.column(split, task.image)
    if not all(isinstance(cell, dict) and cell.keys() == {"file", "width", "height"} for cell in found):
        raise UserError(
            f"{table.folder.name}: '{task.image}' has no prepared images; prepare the table again"
        )
    return [table.folder / cell["file"] for cell in found], [Size(c["width"], c["height"]) for c in found]


def _answers(task: Task, value: Any, names: Sequence[str] | None) -> list[str]:
    """The right answers that a cell holds: one, a list, or a list of objects that each have an `answer` (VQAv2)."""
    several = isinstance(value, list)
    if task.metric in BOX_METRICS:
        several = several and any(isinstance(part, (list, str)) for part in value)
    found = value if several else [value]
    return [
        as_text(part["answer"] if isinstance(part, dict) and "answer" in part else part, names)
        for part in found
    ]


def _wrong(task: Task, answers: list[str], size: Size) -> str | None:
    """What is wrong with the right answers of a row."""
    if not answers or not all(text.strip() for text in answers):
        return " has an empty target; name the column of right answers, or leave the row out"
    if task.metric == VQA and len(answers) < LEAST_PEOPLE:
        return (
            f": vqa compares with the answers of {LEAST_PEOPLE} people or more, here are {len(answers)}; choose "
            "another metric"
        )
    if task.target_box and (
        odd := [text for text in answers if read_box(text, task.target_box, size) is None]
    ):
        return f": the target {odd[0][:80]!r} is no box of four numbers, which {task.metric} compares"
    return None
