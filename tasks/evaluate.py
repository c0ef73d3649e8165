"""The evaluate step: class predictions of a checkpoint on every task, and how many are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from merging.engine import one_thread
from merging.errors import UserError
from merging.files import publish, staged, write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from evaluation.vision import Evaluator

SPLITS = ("val", "test")

# "SPLIT/TASK" -> int32 classes of images; or, of language tasks, 1 where an example is right
Predictions = dict[str, "np.ndarray"]


def write_heads(base: Path, suite: Path, datasets: dict[str, Path], out: Path, device: str) -> None:
    """Class embeddings of every task from the base's text tower: one (C, d) float32 tensor a task.

    Raises:
        UserError: a task without class names, in the suite or in its data; a base without a text tower.
    """
    from safetensors.torch import save

    from evaluation.datasets import load
    from evaluation.suite import load_suite
    from evaluation.vision import build_heads

    tasks = load_suite(suite)
    absent = sorted(set(datasets) - set(tasks.tasks))
    if absent:
        raise UserError(f"{suite}: describes no task '{absent[0]}', which params.yaml evaluates; add it")
    wanted = tasks.model_copy(update={"tasks": {name: tasks.tasks[name] for name in datasets}})
    names = {task: load(folder).classnames for task, folder in datasets.items()}
    with one_thread():
        heads = build_heads(base, wanted, {t: n for t, n in names.items() if n}, device)
    write_bytes(out, save({task: head.cpu().contiguous() for task, head in heads.items()}))


def which_are_right(predicted_N: np.ndarray, labels: Path | None) -> np.ndarray:
    """Which examples are right, bool (N): by the file of their labels, or as predictions of language tasks say."""
    import numpy as np

    return predicted_N == (1 if labels is None else np.load(labels))


def make_evaluator(base: Path, heads: Path, datasets: dict[str, Path], device: str) -> Evaluator:
    """The image tower of `base` with the heads and data of every task."""
    from safetensors.torch import load_file

    from evaluation.datasets import load
    from evaluation.vision import Evaluator

    return Evaluator(
        base, load_file(heads), {task: load(folder) for task, folder in datasets.items()}, device
    )


def evaluate_merge(merge: Path, heads: Path, datasets: dict[str, Path], out: Path, device: str) -> None:
    """Score one merged checkpoint on all tasks and both splits into scores.json and predictions.safetensors."""
    from evaluation.vision import load_state

    with one_thread():
        evaluator = make_evaluator(merge, heads, datasets, device)
        predictions = _predict(evaluator, load_state(merge), list(datasets))
    scores = {"model": merge.name, "splits": _scores(evaluator, predictions)}
    write_evaluation(out, scores, predictions)


def evaluate_baselines(
    base: Path, experts: dict[str, Path], heads: Path, datasets: dict[str, Path], out: Path, device: str
) -> None:
    """Score the base on all tasks and each expert on the task of its name, for normalised accuracy."""
    from evaluation.vision import load_state

    predictions: Predictions = {}
    scores: dict[str, Any] = {}
    with one_thread():
        evaluator = make_evaluator(base, heads, datasets, device)
        for name, folder in {"base": base, **experts}.items():
            tasks = list(datasets) if name == "base" else [name] if name in datasets else []
            found = _predict(evaluator, load_state(folder), tasks)
            scores[name] = _scores(evaluator, found)
            predictions |= {f"{name}/{key}": value for key, value in found.items()}
    write_evaluation(out, {"models": scores}, predictions)


def _predict(evaluator: Evaluator, state: Mapping[str, Tensor], tasks: list[str]) -> Predictions:
    found = {split: evaluator.predict(state, split, tasks) for split in SPLITS}
    return {f"{split}/{task}": classes for split in SPLITS for task, classes in found[split].items()}


def _scores(evaluator: Evaluator, predictions: Predictions) -> dict[str, Any]:
    scores: dict[str, Any] = {split: {} for split in SPLITS}
    for key, classes in predictions.items():
        split, task = key.split("/")
        labels = evaluator.data[task].split(split)[1]
        scores[split][task] = {"correct": int((classes == labels).sum()), "n": len(labels)}
    return scores


def write_evaluation(out: Path, scores: dict[str, Any], predictions: Predictions) -> None:
    """The folder `out` of one evaluation: scores.json and predictions.safetensors."""
    from safetensors.numpy import save

    with staged(out) as partial:
        write_json(partial / "scores.json", scores)
        write_bytes(partial / "predictions.safetensors", save(predictions))
        publish(partial, out)
