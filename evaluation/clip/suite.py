"""Suites: the tasks a model is measured on, with the prompts of their zero-shot heads, as one YAML file.

tasks:
  MNIST:
    templates: ['a photo of the number: "{}".']
    classnames: ["0", "1", ...]     # in the order of the labels; left out, they come from the dataset
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mergeline.merging.strict_yaml import YamlFile


def _template(text: str) -> str:
    if text.count("{}") != 1 or set("{}") & set(text.replace("{}", "")):
        raise ValueError("a template holds {} once, where the class name goes, and no other braces")
    return text


def _distinct(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"class name {twice!r} is listed twice")
    return names


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Template = Annotated[str, AfterValidator(_template)]
Classname = Annotated[str, Field(min_length=1)]
Classnames = Annotated[list[Classname], Field(min_length=2), AfterValidator(_distinct)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # it becomes a file name


class Task(_Strict):
    """Prompt templates, and class names in the order of the labels (None: the dataset's own)."""

    templates: Annotated[list[Template], Field(min_length=1)]
    classnames: Classnames | None = None


class Suite(_Strict):
    tasks: Annotated[dict[TaskName, Task], Field(min_length=1)]


def load_suite(path: Path | str) -> Suite:
    """Read and check a suite.

    Raises:
        UserError: `file:line: what is wrong`, with the nearest known key for a typo.
    """
    return YamlFile(Path(path)).parse(Suite)
