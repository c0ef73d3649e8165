"""The inputs and right answers of a text-to-text task, made from the rows of a table."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

from mergeline.evaluation.tables import Table
from mergeline.evaluation.text2text.metrics import SPEARMAN, number
from mergeline.evaluation.text2text.settings import Task, places
from mergeline.merging.errors import UserError, did_you_mean


class Texts(NamedTuple):
    """Of each of N examples, what the model reads and what it should write."""

    sources: list[str]
    targets: list[str]


def texts(task: Task, table: Table, split: str) -> Texts:
    """The examples of a split, in their order.

    Raises:
        UserError: a column is missing, or empty in a row; a target is empty, has no entry in `answers`, or is no number
            where spearman compares numbers.
    """
    where = f"{table.folder.name}: row %d of {split}"
    made = filled(task.target, table, split) if "{" in task.target else cells(task.target, table, split)
    targets = [_answer(task, text, where % i) for i, text in enumerate(made)]
    return Texts(sources(task, table, split), targets)


def sources(task: Task, table: Table, split: str) -> list[str]:
    """What the model reads of the examples of a split, without the right answers (raises UserError as `texts`)."""
    if task.template is not None:
        return filled(task.template, table, split)
    return cells(task.source, table, split)


def _answer(task: Task, text: str, where: str) -> str:
    if task.answers:
        if text not in task.answers:
            raise UserError(
                f"{where}: `answers` has none for the target {text!r}{did_you_mean(text, task.answers)}"
            )
        text = task.answers[text]
    if not text.strip():
        raise UserError(
            f"{where} has an empty target; name the column of right answers, or leave the row out"
        )
    if task.metric == SPEARMAN and number(text) != number(text):
        raise UserError(
            f"{where}: the target {text!r} is no number, with which spearman compares; choose another metric"
        )
    return text


def cells(name: str, table: Table, split: str) -> list[str]:
    """The values of a column as texts (raises UserError where a row has none)."""
    names = table.classnames.get(name)
    return [as_text(value, names) for value in table.column(split, name)]


def as_text(value: Any, names: Sequence[str] | None) -> str:
    """A value as a text; names: of the numbers of its column."""
    is_class = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return names[value] if is_class and names is not None else str(value)


def filled(template: str, table: Table, split: str) -> list[str]:
    """A template with the values of each row (raises UserError where a row lacks one)."""
    parts = places(template)
    values = {column: cells(column, table, split) for _, column in parts if column is not None}
    count = len(table.rows(split))
    return [
        "".join(text + (values[column][i] if column is not None else "") for text, column in parts)
        for i in range(count)
    ]
