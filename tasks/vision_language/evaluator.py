"""Measures models that read images and texts: what they write to every example, and how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable

from mergeline.evaluation.tables import load_table
from mergeline.evaluation.vision_language.metrics import answers
from mergeline.evaluation.vision_language.models import load_reader
from mergeline.evaluation.vision_language.questions import Questions, questions
from mergeline.tasks.data_step import dataset
from mergeline.tasks.writers.evaluator import Write, WritingEvaluator, Wrote

if TYPE_CHECKING:
    from mergeline.tasks.vision_language.params import VisionLanguageParams


class ReaderEvaluator(WritingEvaluator):
    """Answers are the scores of evaluation/vision_language/metrics.py, float64 (N).

    Raises:
        UserError: the tables and the settings do not fit one another.
    """

    def __init__(self, params: VisionLanguageParams, build: Path):
        self._params = params
        self._questions: dict[tuple[str, str], Questions] = {}
        tables = {task: load_table(dataset(build, task)) for task in params.tasks}
        for task, table in tables.items():
            for split in ("val", "test"):
                self._questions[split, task] = questions(params.vision_language.task(task), table, split)

    def count(self, split: str, task: str) -> int:
        return len(self._questions[split, task].asked)

    def opened(self, folder: Path) -> Write:
        settings = self._params.vision_language
        reader = load_reader(folder, settings.dtype, self._params.device, settings.prompt)

        def write(split: str, name: str, more: Callable[[int], None]) -> Wrote:
            task, own = settings.task(name), self._questions[split, name]
            texts = reader.write(own.images, own.asked, task.max_new_tokens, settings.batch_size, more)
            lower, boxes = task.normalise == "lower", (task.target_box, task.written_box)
            kept = answers(task.metric, texts, own.targets, own.sizes, lower, *boxes)
            return Wrote(kept, zip(own.asked, map(" | ".join, own.targets), texts))

        return write
