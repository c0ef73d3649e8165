"""What is said of models that are served: their inputs, their answers, what they need; and how inputs are read."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Mapping[str, Any]  # an input: its columns
Predict = Callable[
    [Sequence[Row], Mapping[str, Any]], list[dict[str, Any]]
]  # rows, parameters -> a row for each

MAX_NEW_TOKENS = "max_new_tokens"  # of a request: the longest text that is written
# Types of columns, as MLflow names them.
TEXT, OPTIONAL_TEXT, NUMBER, VECTOR = "string", "optional string", "double", "vector"


class Served(NamedTuple):
    """How models of a pipeline are served.

    inputs, outputs: columns -> their types. settings: JSON that the predictor is given. files: what lies beside it, by
    names. parameters: what a request may say besides, with defaults.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    settings: Mapping[str, Any]
    files: Mapping[str, Path] = {}
    parameters: Mapping[str, int] = {}


def task_of(row: Row, tasks: Sequence[str]) -> str:
    """The task that a row names; the only one where there is no other.

    Raises:
        UserError: it names none, or one that is not known.
    """
    task = row.get("task") or (tasks[0] if len(tasks) == 1 else None)
    if task not in tasks:
        known = f"name one in `task`: {', '.join(tasks)}"
        raise UserError(
            known if task is None else f"'{task}' is no task{did_you_mean(str(task), tasks)}; {known}"
        )
    return str(task)


def image_of(row: Row) -> Image:
    """The image of a row: the bytes of a PNG, JPEG ... file, or these in base64 (raises UserError)."""
    from mergeline.evaluation.vision_language.images import decoded

    data = row.get("image")
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise UserError("the image is no base64 of a file; a data: URI begins too early") from None
    if not isinstance(data, bytes):
        raise UserError("`image` holds no image: give the bytes of a file, in base64")
    return decoded(data, "`image`")[0]


def text_of(row: Row, column: str) -> str:
    """A text of a row (raises UserError if there is none)."""
    text = row.get(column)
    if not isinstance(text, str):
        raise UserError(f"`{column}` holds no text")
    return text
