"""The evaluator of embedding models: their answers on the prepared tables of a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from mergeline.evaluation.embeddings.models import load_model
from mergeline.evaluation.embeddings.scores import answers, texts
from mergeline.tasks.data_step import dataset
from mergeline.tasks.embeddings.learning import network_of
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.progress import adding

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.embeddings.models import Embedder
    from mergeline.tasks.embeddings.params import EmbeddingParams


class EmbeddingEvaluator:
    """Answers are those of evaluation/embeddings/scores.py. States in memory are put into the model of `like`."""

    def __init__(self, params: EmbeddingParams, build: Path, like: Path):
        self._params, self._build, self._like = params, build, like
        self._shared: Embedder | None = None

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        settings, embedder = self._params.embeddings, self._opened(model)
        folders = {task: dataset(self._build, task) for task in tasks}
        total = sum(texts(folder, settings.tasks[task], splits) for task, folder in folders.items())
        found: dict[str, np.ndarray] = {}
        with adding("texts", total) as more:
            for task, folder in folders.items():
                prompts = settings.prompts.get(task, {})
                of = answers(
                    embedder, folder, settings.tasks[task], splits, prompts, settings.batch_size, more
                )
                found |= {f"{split}/{task}": answer for split, answer in of.items()}
        return Evaluation(found, {})

    def _opened(self, model: Model) -> Embedder:
        if isinstance(model, Path):
            return load_model(model, self._params.device)
        if self._shared is None:
            self._shared = load_model(self._like, self._params.device)
        network_of(self._shared).load(model)
        return self._shared
