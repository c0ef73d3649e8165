"""The evaluate step of language models: what lm-eval finds right, perplexities, and whether a model works at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.language import LanguageEvaluator, load_model
from merging import merge
from merging.adapters import is_adapter
from merging.checkpoint import open_checkpoint
from merging.engine import one_thread
from merging.files import staged
from tasks.evaluate import SPLITS, Predictions, write_evaluation

if TYPE_CHECKING:
    import numpy as np

    from evaluation.language import LoadedModel, Scores
    from tasks.params import Params


def evaluate_merge(params: Params, folder: Path, out: Path) -> None:
    """Score one merged checkpoint on all tasks and both splits into scores.json and predictions.safetensors."""
    evaluator = make_evaluator(params)
    with one_thread():
        model = _load(params, folder)
        scores, predictions = _evaluate(evaluator, model, params.tasks)
        scores = {"model": folder.name, "checks": model.check(), **scores}
    write_evaluation(out, scores, predictions)


def evaluate_baselines(params: Params, base: Path, experts: dict[str, Path], out: Path, scratch: Path) -> None:
    """Score the base on all tasks and each expert on its own; adapters as the engine reads them, on their base."""
    evaluator = make_evaluator(params)
    predictions: Predictions = {}
    models: dict[str, Any] = {}
    for name, folder in {"base": base, **experts}.items():
        tasks = params.tasks if name == "base" else [t for t, e in params.owners.items() if e == name]
        with staged(scratch) as place, one_thread():
            if name != "base" and is_adapter(open_checkpoint(folder)):
                merge({"method": "average", "base": base, "experts": {name: folder}}, place / name, workers=1)
                folder = place / name
            models[name], found = _evaluate(evaluator, _load(params, folder), tasks)
        predictions |= {f"{name}/{key}": value for key, value in found.items()}
    write_evaluation(out, {"models": models}, predictions)


def make_evaluator(params: Params) -> LanguageEvaluator:
    """The tasks of params.yaml."""
    return LanguageEvaluator(params.language, params.seed)


def validation_accuracy(params: Params, evaluator: LanguageEvaluator, folder: Path) -> dict[str, Any]:
    """Validation accuracy of a checkpoint on each task, and its mean."""
    with one_thread():
        right = evaluator.score(_load(params, folder), "val", params.tasks).right
    accuracy = {task: float(right_N.mean()) for task, right_N in right.items()}
    return {"mean": sum(accuracy.values()) / len(accuracy), "tasks": accuracy}


def _load(params: Params, folder: Path) -> LoadedModel:
    return load_model(folder, params.language.dtype, params.device)


def _evaluate(
    evaluator: LanguageEvaluator, model: LoadedModel, tasks: list[str]
) -> tuple[dict[str, Any], Predictions]:
    found: dict[str, Scores] = {}
    for split in SPLITS:
        perplexity = evaluator.language.perplexity if split == "test" else []
        found[split] = evaluator.score(model, split, tasks, perplexity)
    scores = {
        "splits": {split: _counts(scores.right) for split, scores in found.items()},
        "perplexity": found["test"].perplexity,
        "lm_eval": {split: scores.lm_eval for split, scores in found.items()},
    }
    right = {f"{split}/{task}": r for split, s in found.items() for task, r in s.right.items()}
    return scores, {key: right_N.astype("int32") for key, right_N in right.items()}


def _counts(right: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    return {task: {"correct": int(right_N.sum()), "n": len(right_N)} for task, right_N in right.items()}
