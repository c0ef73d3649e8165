"""Tables of pairs with scores, and of queries with a corpus, as embedding models are measured on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from mergeline.evaluation.embeddings.settings import Retrieval, Similarity
from mergeline.evaluation.splits import FIT, SPLITS
from mergeline.evaluation.tables import Table, load_table
from mergeline.merging.errors import UserError, did_you_mean

CORPUS = "corpus"  # the table of documents, with an id and a text each


@dataclass(frozen=True)
class Pairs:
    """Texts in pairs, and how alike each pair is, float64 (N)."""

    first: list[str]
    second: list[str]
    score_N: np.ndarray


@dataclass(frozen=True)
class Queries:
    """Texts of queries, and of each the relevant documents: index in the corpus -> grade, above 0."""

    texts: list[str]
    relevant: list[dict[int, float]]


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their table. index: id -> place."""

    texts: list[str]
    index: Mapping[str, int]


def beside(task: Similarity | Retrieval) -> tuple[str, ...]:
    """The tables that a task needs besides its splits."""
    return (CORPUS,) if isinstance(task, Retrieval) else ()


def check(folder: Path, task: Similarity | Retrieval) -> None:
    """See that a prepared table is what its task needs (raises UserError)."""
    table = load_table(folder)
    for split in (*SPLITS, FIT):
        if isinstance(task, Similarity):
            pairs(table, task, split)
        else:
            queries(table, task, split, corpus(table))


def pairs(table: Table, task: Similarity, split: str) -> Pairs:
    """The pairs of a split.

    Raises:
        UserError: a row lacks a column, a text is none, a score is no finite number.
    """
    scores = table.column(split, task.score)
    first, second = (_texts(table, split, name) for name in (task.first, task.second))
    return Pairs(
        first, second, np.array([_number(s, table, split, i, task.score) for i, s in enumerate(scores)])
    )


def corpus(table: Table) -> Corpus:
    """The documents that queries are about.

    Raises:
        UserError: there is none, a document has no id or no text, an id is given twice.
    """
    ids = [_id(value) for value in table.column(CORPUS, "id")]
    index = {id: i for i, id in reversed([*enumerate(ids)])}
    if len(index) < len(ids):
        twice = next(id for i, id in enumerate(ids) if index[id] != i)
        raise UserError(
            f"{table.folder.name}: the document '{twice}' is in the corpus twice; give each its own id"
        )
    return Corpus(_texts(table, CORPUS, "text"), index)


def queries(table: Table, task: Retrieval, split: str, corpus: Corpus) -> Queries:
    """The queries of a split.

    Raises:
        UserError: a row lacks a column, names a document that is not in the corpus, or none that is relevant.
    """
    texts = _texts(table, split, task.query)
    relevant = table.column(split, task.relevant)
    return Queries(texts, [_grades(value, corpus, table, split, i) for i, value in enumerate(relevant)])


def _grades(value: Any, corpus: Corpus, table: Table, split: str, row: int) -> dict[int, float]:
    where = f"{table.folder.name}: row {row} of {split}"
    if isinstance(value, dict):
        # Tables of one schema have all keys in every row: those without a value are not this row's.
        grades = {
            id: _number(g, table, split, row, f"grade of '{id}'") for id, g in value.items() if g is not None
        }
    elif isinstance(value, list):
        grades = {_id(id): 1.0 for id in value}
    else:
        raise UserError(
            f"{where}: relevant documents must be a list of ids, or an object id -> grade, not {value!r}"
        )
    if unknown := [id for id in grades if id not in corpus.index]:
        near = did_you_mean(unknown[0], [*corpus.index]) if len(corpus.index) < 10_000 else ""
        raise UserError(f"{where}: '{unknown[0]}' is no document of the corpus{near}")
    if negative := [id for id, grade in grades.items() if grade < 0]:
        raise UserError(
            f"{where}: the grade of '{negative[0]}' is {grades[negative[0]]:g}; grades are 0 or more"
        )
    if not any(grades.values()):
        raise UserError(f"{where}: no document is relevant; leave the query out")
    return {corpus.index[id]: grade for id, grade in grades.items() if grade}


def _texts(table: Table, split: str, name: str) -> list[str]:
    values = table.column(split, name)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{table.folder.name}: '{name}' of row {i} of {split} is no text but {value!r}")
    return values


def _number(value: Any, table: Table, split: str, row: int, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{table.folder.name}: {name} of row {row} of {split} is no finite number but {value!r}"
        )
    return number


def _id(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
