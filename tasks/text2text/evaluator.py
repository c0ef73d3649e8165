"""Measures sequence-to-sequence models: what they write to every example, and how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable

from mergeline.evaluation.tables import load_table
from mergeline.evaluation.text2text.metrics import answers
from mergeline.evaluation.text2text.models import load_writer
from mergeline.evaluation.text2text.texts import Texts, texts
from mergeline.tasks.data_step import dataset
from mergeline.tasks.writers.evaluator import Write, WritingEvaluator, Wrote

if TYPE_CHECKING:
    from mergeline.tasks.text2text.params import Text2TextParams


class TextEvaluator(WritingEvaluator):
    """Answers are what evaluation/text2text/metrics.py keeps of a text: float64 (N), or (N, 2) for a correlation.

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

    def count(self, split: str, task: str) -> int:
        return len(self._texts[split, task].sources)

    def opened(self, folder: Path) -> Write:
        settings, writer = self._params.text2text, load_writer(folder, self._params.device)

        def write(split: str, name: str, more: Callable[[int], None]) -> Wrote:
            task, own = settings.task(name), self._texts[split, name]
            written = writer.write(own.sources, task.max_new_tokens, settings.batch_size, more)
            kept = answers(task.metric, written.texts, own.targets, task.normalise == "lower")
            return Wrote(kept, zip(own.sources, own.targets, written.texts), written.cut)

        return write
