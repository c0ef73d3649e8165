"""What a text-to-text task is: how its inputs and targets are made from rows of a table, and how answers are scored."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mergeline.evaluation.text2text.metrics import MetricName


def places(template: str) -> list[tuple[str, str | None]]:
    """What a template is made of: each text, and the column whose value follows it (None at the end).

    Raises:
        ValueError: a brace that is not closed, or more in one than the name of a column.
    """
    found = []
    for text, column, form, conversion in Formatter().parse(template):
        if column is not None and (not column.strip() or form or conversion):
            raise ValueError(
                f"'{template}': write the name of a column in braces, as {{text}}; {{{{ and }}}} are braces"
            )
        found.append((text, column))
    return found


def _template(text: str) -> str:
    places(text)
    return text


def _texts(value: Any) -> Any:
    """YAML reads `0: no` as a number and a truth value."""
    if not isinstance(value, dict):
        return value
    if odd := [answer for answer in value.values() if not isinstance(answer, str)]:
        raise ValueError(f"{odd[0]!r} is no text; put it into quotes")
    return {str(key): answer for key, answer in value.items()}


Template = Annotated[str, Field(min_length=1), AfterValidator(_template)]


class Task(BaseModel):
    """An entry of `text2text.tasks` of params.yaml.

    source: the column of inputs, or template: a text with {column} places that makes them from a row. target: the
    column of right answers, or a template. Numbers of classes are written as the table's own names of them, where it
    has some. answers: what the model should write for each target, where that is something else: {0: "no", 1: "yes"}.
    metric: see evaluation/text2text/metrics.py. normalise: `lower` compares in lower case. max_new_tokens: of an
    answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "source"
    target: Template = "target"
    template: Template | None = None
    answers: Annotated[dict[str, str], BeforeValidator(_texts)] = {}
    metric: MetricName = "exact_match"
    normalise: Literal["none", "lower"] = "none"
    max_new_tokens: Annotated[int, Field(gt=0)] = 16
