"""The evaluator of models of every pixel: a trunk under the head of each task's own expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Sequence, cast

import numpy as np

from mergeline.evaluation.dense_prediction.data import DenseSet, load
from mergeline.evaluation.dense_prediction.metrics import answers
from mergeline.evaluation.dense_prediction.models import refuse_channels
from mergeline.evaluation.pixels import Pixels, normalisation
from mergeline.evaluation.state import load_state
from mergeline.tasks.data_step import dataset
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    from mergeline.tasks.dense_prediction.family import Family


class DenseEvaluator:
    """Answers are what evaluation/dense_prediction/metrics.py keeps of an image: float64 (N), of miou (N, K, 2).

    Raises:
        UserError: models and data do not fit one another.
    """

    def __init__(self, family: Family, build: Path):
        import torch

        self._family, params = family, family.params
        self._settings, self._device = params.dense_prediction, params.device
        settings = self._settings
        told = normalisation(family.folders, settings.model, settings.mean, settings.std, "dense_prediction")
        self._pixels = Pixels(*told, params.device)
        self._sets: dict[str, DenseSet] = {task: load(dataset(build, task)) for task in params.tasks}
        for task, own in self._sets.items():
            images = self._pixels(own.split("val")[0][:1])
            with torch.inference_mode():
                maps = family.predictor(task).predicted(images)
            refuse_channels(task, self._settings.tasks[task].target, maps.shape[1], own.classes)

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        import torch

        folder = cast(Path, model)
        state = self._family.base_state() if folder == self._family.base else load_state(folder)
        total = sum(len(self._sets[task].split(split)[0]) for split in splits for task in tasks)
        found: dict[str, np.ndarray] = {}
        with adding("examples", total) as more, torch.inference_mode():
            for task in tasks:
                predictor, metric = self._family.predictor(task), self._settings.tasks[task].metric
                predictor.load(state, folder)
                for split in splits:
                    x, y = self._sets[task].split(split)
                    parts = []
                    for start in range(0, len(x), self._settings.batch_size):
                        which = slice(start, start + self._settings.batch_size)
                        right = torch.from_numpy(np.array(y[which])).to(self._device)
                        parts.append(answers(metric, predictor.predicted(self._pixels(x[which])), right))
                        more(len(parts[-1]))
                    found[f"{split}/{task}"] = np.concatenate(parts)
        return Evaluation(found, {})
