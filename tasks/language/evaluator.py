"""The evaluator of language models: what lm-eval finds right, perplexities, and whether a model works at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence, cast

import numpy as np

from mergeline.evaluation.language import LanguageEvaluator, load_model
from mergeline.evaluation.language.server import served
from mergeline.evaluation.metrics import is_right_or_wrong
from mergeline.tasks.modality import Evaluation, Model
from mergeline.tasks.progress import counting

if TYPE_CHECKING:
    from mergeline.evaluation.language import LoadedModel, Scores
    from mergeline.evaluation.language.server import ServedModel
    from mergeline.tasks.language.params import LanguageParams


class TaskEvaluator:
    """Answers say how good the model's are, larger is better: 1 or 0 where they are right or wrong, int32 (N), else
    float64 (N). Models are folders.

    scores, where the test split is measured: "perplexity", "lm_eval" (lm-eval's own numbers) and "checks".
    """

    def __init__(self, params: LanguageParams, log: Path):
        """log: where a server that fails leaves what it wrote."""
        self._params, self._log = params, log
        self._evaluator = LanguageEvaluator(params.language, params.seed)

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        language, folder = self._params.language, cast(Path, model)
        if language.server:
            with served(folder, language.server, self._log) as running:
                return self._measured(running, splits, tasks)
        return self._measured(load_model(folder, language.dtype, self._params.device), splits, tasks)

    def _measured(
        self, loaded: LoadedModel | ServedModel, splits: Sequence[str], tasks: Sequence[str]
    ) -> Evaluation:
        language = self._params.language
        found: dict[str, Scores] = {}
        for split in splits:
            perplexity = language.perplexity if split == "test" else []
            with counting(f"requests on {split}") as count:
                found[split] = self._evaluator.score(loaded, split, tasks, perplexity, count)
        answers = {f"{split}/{task}": g for split, s in found.items() for task, g in s.graded.items()}
        scores: dict[str, Any] = {}
        if "test" in found:
            scores = {
                "checks": loaded.check(),
                "perplexity": found["test"].perplexity,
                "lm_eval": {split: s.lm_eval for split, s in found.items()},
            }
        whole = {key: is_right_or_wrong(graded_N) for key, graded_N in answers.items()}
        return Evaluation(
            {key: a.astype(np.int32) if whole[key] else a for key, a in answers.items()}, scores
        )
