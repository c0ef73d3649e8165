"""The evaluator of classifiers: a trunk under the head of each task's own expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence, cast

import numpy as np

from mergeline.evaluation.classifiers.labels import matched, refuse_labels
from mergeline.evaluation.classifiers.model import Classifier
from mergeline.evaluation.state import load_state
from mergeline.merging.errors import UserError
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    from mergeline.tasks.classifiers.data import Data
    from mergeline.tasks.classifiers.family import Family


class ClassifierEvaluator:
    """Answers are the labels of the likeliest classes, int32 (N); of a head with one number these, float32 (N).

    Raises:
        UserError: models and data do not fit one another.
    """

    def __init__(self, family: Family, data: Data):
        module = family.module(data.kind)
        data.prepare(module)
        self._family, self._data = family, data
        self._classifier = Classifier(module, family.heads)
        self._labels = {task: self._matched(task) for task in family.heads}

    def _matched(self, task: str) -> list[int] | None:
        """Of the classes of a head, where they are other numbers than the labels."""
        classes = self._classifier.classes(task)
        for split in ("val", "test"):
            labels = self._data.labels(task, split)
            if labels is None:
                raise UserError(f"{task}: {split} has no labels, which are needed to measure")
            if (labels.dtype.kind == "f") != (classes == 1):
                other = (
                    "several classes; its target is `class`"
                    if classes > 1
                    else "one number; its target is `number`"
                )
                raise UserError(f"{task}: the head of its expert gives {other}")
            if classes > 1:
                refuse_labels(task, split, int(labels.max()), classes)
        return (
            matched(task, self._family.config(task), classes, self._data.names(task)) if classes > 1 else None
        )

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        return self._answers(model, {(split, task): None for split in splits for task in tasks})

    def count(self, split: str, task: str) -> int:
        return self._data.count(task, split)

    def evaluate_part(self, model: Model, split: str, part: Mapping[str, np.ndarray]) -> Evaluation:
        return self._answers(model, {(split, task): which_n for task, which_n in part.items()})

    def _answers(self, model: Model, asked: Mapping[tuple[str, str], np.ndarray | None]) -> Evaluation:
        """Of the examples with these numbers, or all, by split and task; those of others are 0."""
        import torch

        folder = cast(Path, model)
        state = self._family.base_state() if folder == self._family.base else load_state(folder)
        self._classifier.load(state, folder)
        total = sum(self.count(*which) if part is None else len(part) for which, part in asked.items())
        answers: dict[str, np.ndarray] = {}
        with adding("examples", total) as more, torch.inference_mode():
            for (split, task), part in asked.items():
                found = np.zeros(self.count(split, task), np.float32)
                for which, batch in self._data.batches(task, split, part):
                    features = self._classifier.features(batch, task)
                    found[which] = self._answered(self._classifier.logits(features, task), task)
                    more(len(which))
                answers[f"{split}/{task}"] = found if self._is_number(task) else found.astype(np.int32)
        by_name = sorted({task for _, task in asked if self._labels[task]})
        return Evaluation(answers, {"labels_by_name": by_name} if by_name else {})

    def _is_number(self, task: str) -> bool:
        return self._classifier.classes(task) == 1

    def _answered(self, logits_BC: Any, task: str) -> np.ndarray:
        if self._is_number(task):
            return logits_BC[:, 0].float().cpu().numpy()
        found, labels = logits_BC.argmax(1).cpu().numpy(), self._labels[task]
        return np.array(labels)[found] if labels else found
