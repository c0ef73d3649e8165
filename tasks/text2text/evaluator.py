"""The evaluator of sequence-to-sequence models: what they write to every example, and how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Sequence, cast

import numpy as np

from mergeline.evaluation.tables import load_table
from mergeline.evaluation.text2text.metrics import SPEARMAN, answers
from mergeline.evaluation.text2text.models import load_writer
from mergeline.evaluation.text2text.texts import Texts, texts
from mergeline.tasks.data_step import dataset
from mergeline.tasks.modality import Evaluation, Json, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    from mergeline.tasks.text2text.params import Text2TextParams

_SAMPLES = 3  # of each task
_SHOWN = 300  # letters of a text in a sample


class TextEvaluator:
    """Answers are what evaluation/text2text/metrics.py keeps of a text: float64 (N), or (N, 2) for a correlation.

    Models are folders. scores, of the test split where it is measured: "samples", of each task the first inputs, right
    answers and texts; "no_number", the share of texts that should be a number and are none; and of all splits "cut",
    how many inputs were longer than the model reads, where some were.

    Raises:
        UserError: the tables and the settings do not fit one another.
    """

    def __init__(self, params: Text2TextParams, build: Path):
        self._params = params
        self._texts: dict[tuple[str, str], Texts] = {}
        tables = {task: load_table(dataset(build, task)) for task in params.tasks}
        for task, table in tables.items():
            for split in ("val", "test"):
                self._texts[split, task] = texts(params.text2text.task(task), table, split)

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        settings = self._params.text2text
        writer = load_writer(cast(Path, model), self._params.device)
        asked = [(split, task) for split in splits for task in tasks]
        total = sum(len(self._texts[key].sources) for key in asked)
        found: dict[str, np.ndarray] = {}
        scores: Json = {}
        with adding("examples", total) as more:
            for split, name in asked:
                task, own = settings.task(name), self._texts[split, name]
                written = writer.write(own.sources, task.max_new_tokens, settings.batch_size, more)
                kept = answers(task.metric, written.texts, own.targets, task.normalise == "lower")
                found[f"{split}/{name}"] = kept
                if written.cut:
                    scores.setdefault("cut", {})[f"{split}/{name}"] = written.cut
                if split == "test":
                    triples = [*zip(own.sources, own.targets, written.texts)][:_SAMPLES]
                    shown = [[text[:_SHOWN] for text in triple] for triple in triples]
                    scores.setdefault("samples", {})[name] = shown
                    if task.metric == SPEARMAN:
                        scores.setdefault("no_number", {})[name] = float(np.isnan(kept[:, 0]).mean())
        return Evaluation(found, scores)
