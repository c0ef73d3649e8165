"""Measures models by the texts that they write to every example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence, cast

import numpy as np

from mergeline.tasks.modality import Evaluation, Json, Model
from mergeline.tasks.progress import adding

_SAMPLES = 3  # of each task
_SHOWN = 300  # letters of a text in a sample


class Wrote(NamedTuple):
    """What came of N examples.

    kept: what outcomes are made of; (N), or (N, 2) where numbers are compared. shown: of each what was asked, the right
    answer and the text. cut: how many inputs were longer than the model reads.
    """

    kept: np.ndarray
    shown: Iterable[tuple[str, str, str]]
    cut: int = 0


# (split, task, what is told how many examples are done) -> what came of it
Write = Callable[[str, str, Callable[[int], None]], Wrote]


class WritingEvaluator(ABC):
    """Models are folders.

    scores, of the test split where it is measured: "samples", of each task the first inputs, right answers and texts;
    "no_number", the share of texts that should be a number and are none; and of all splits "cut", how many inputs were
    longer than the model reads, where some were.
    """

    @abstractmethod
    def count(self, split: str, task: str) -> int:
        """How many examples there are."""

    @abstractmethod
    def opened(self, folder: Path) -> Write:
        """What asks the model of a folder (raises UserError)."""

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        write = self.opened(cast(Path, model))
        asked = [(split, task) for split in splits for task in tasks]
        found: dict[str, np.ndarray] = {}
        scores: Json = {}
        with adding("examples", sum(self.count(*key) for key in asked)) as more:
            for split, task in asked:
                wrote = write(split, task, more)
                found[f"{split}/{task}"] = wrote.kept
                if wrote.cut:
                    scores.setdefault("cut", {})[f"{split}/{task}"] = wrote.cut
                if split == "test":
                    shown = [[text[:_SHOWN] for text in triple] for triple in [*wrote.shown][:_SAMPLES]]
                    scores.setdefault("samples", {})[task] = shown
                    if wrote.kept.ndim == 2:
                        share = float(np.isnan(wrote.kept[:, 0]).mean())
                        scores.setdefault("no_number", {})[task] = share
        return Evaluation(found, scores)
