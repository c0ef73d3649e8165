"""The evaluate and baselines steps: what models answer on every example of every task, and how good that is.

An evaluation is a folder: predictions.safetensors with the answers, scores.json with what they come to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Mapping

from mergeline.evaluation.measures import Measures
from mergeline.evaluation.metrics import is_right_or_wrong
from mergeline.merging import merge
from mergeline.merging.checkpoints.adapters import is_adapter
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.errors import UserError
from mergeline.merging.files import publish, staged, write_bytes, write_json
from mergeline.tasks.evaluations import Evaluations
from mergeline.tasks.progress import counting, said_of_stage

if TYPE_CHECKING:
    import numpy as np

    from mergeline.tasks.modality import Evaluation, Modality
    from mergeline.tasks.schema import Params

SPLITS = ("val", "test")
PREDICTIONS, SCORES = "predictions.safetensors", "scores.json"


def evaluate_merge(modality: Modality, params: Params, build: Path, folder: Path, out: Path) -> None:
    """Measure one merged checkpoint on all tasks and both splits into the evaluation `out`.

    Raises:
        UserError: it does not open, or does not fit the data.
    """
    evaluator = Evaluations(modality, params, build, folder)
    with one_thread():
        found = evaluator.evaluate(folder, SPLITS, params.tasks)
    said_of_stage(evaluator.told(1, "models"))
    scores = {"model": folder.name, **_scores(modality, params, build, found)}
    write_evaluation(out, scores, found.answers)


def evaluate_baselines(
    modality: Modality,
    params: Params,
    build: Path,
    base: Path,
    experts: Mapping[str, Path],
    out: Path,
    scratch: Path,
) -> None:
    """Measure the base on all tasks and each expert on its own into the evaluation `out`.

    Adapters are measured as the engine reads them, on their base; `scratch` is a place for one merged model.

    Raises:
        UserError: as `evaluate_merge`.
    """
    answers: dict[str, np.ndarray] = {}
    scores: dict[str, Any] = {}
    models = {"base": base, **experts}
    with one_thread(), counting("models") as count:
        evaluator = Evaluations(modality, params, build, base)
        heads = modality.heads(params, build)
        for i, (name, folder) in enumerate(models.items()):
            count(i, len(models))
            tasks = params.tasks if name == "base" else [t for t, e in params.owners.items() if e == name]
            with staged(scratch) as place:
                if name != "base" and is_adapter(open_checkpoint(folder)):
                    recipe = {"method": "average", "base": base, "experts": {name: folder}, "heads": heads}
                    merge(recipe, place / name, workers=1)
                    folder = place / name
                found = evaluator.evaluate(folder, SPLITS, tasks)
            scores[name] = _scores(modality, params, build, found)
            answers |= {f"{name}/{key}": value for key, value in found.answers.items()}
        said_of_stage(evaluator.told(len(models), "models"))
    write_evaluation(out, {"models": scores}, answers)


def write_evaluation(out: Path, scores: dict[str, Any], answers: dict[str, np.ndarray]) -> None:
    """The folder `out` of one evaluation."""
    from safetensors.numpy import save

    with staged(out) as partial:
        write_json(partial / SCORES, scores)
        write_bytes(partial / PREDICTIONS, save(answers))
        publish(partial, out)


def read_outcomes(
    modality: Modality, build: Path, predictions: Path, split: str, tasks: Collection[str], model: str = ""
) -> dict[str, np.ndarray]:
    """How good each answer in a predictions file is, (N) by task; `model` is one of the baselines.

    Raises:
        UserError: an outcome is NaN or infinite.
    """
    from safetensors.numpy import load_file

    answers = load_file(predictions)
    prefix = f"{model}/{split}" if model else split
    return {
        task: _outcomes(modality, build, split, task, answers[f"{prefix}/{task}"], f"{predictions}: {prefix}")
        for task in tasks
    }


def mean_outcomes(
    modality: Modality, build: Path, found: Evaluation, split: str, held_back: bool = False
) -> dict[str, float]:
    """The mean outcome on each task that was measured on a split; otherwise as `outcomes_of`."""
    outcomes = outcomes_of(modality, build, found, split, held_back)
    return {task: float(outcome_N.mean()) for task, outcome_N in outcomes.items()}


def outcomes_of(
    modality: Modality, build: Path, found: Evaluation, split: str, held_back: bool = False
) -> dict[str, np.ndarray]:
    """The outcomes (N) on each task that was measured on a split.

    held_back: only of the examples of val that merges are not fitted to.

    Raises:
        UserError: there are none.
    """
    outcomes = {}
    for (measured, task), outcome_N in _by_split(modality, build, found).items():
        if measured == split:
            own_N = outcome_N[modality.choosing(build, task) if held_back else slice(None)]
            if not len(own_N):
                raise UserError(
                    f"'{task}' has {len(outcome_N)} example of val, to which merges are fitted, and none to choose by; "
                    "bring more, or a split fit"
                )
            outcomes[task] = own_N
    return outcomes


def _scores(modality: Modality, params: Params, build: Path, found: Evaluation) -> dict[str, Any]:
    measures = Measures(modality.measures(params))
    splits: dict[str, Any] = {split: {} for split in SPLITS}
    for (split, task), outcome_N in _by_split(modality, build, found).items():
        measure = measures.of(task)
        if is_right_or_wrong(outcome_N) and not measure.lower:
            splits[split][task] = {"correct": int(outcome_N.sum()), "n": len(outcome_N)}
        else:
            splits[split][task] = {"mean": measure.turned(float(outcome_N.mean())), "n": len(outcome_N)}
    return {"splits": splits, **found.scores}


def _by_split(modality: Modality, build: Path, found: Evaluation) -> dict[tuple[str, str], np.ndarray]:
    """The outcomes (N) by split and task."""
    outcomes = {}
    for key, answers in found.answers.items():
        split, _, task = key.partition("/")
        outcomes[split, task] = _outcomes(modality, build, split, task, answers, f"the evaluation on {split}")
    return outcomes


def _outcomes(
    modality: Modality, build: Path, split: str, task: str, answers: np.ndarray, where: str
) -> np.ndarray:
    import numpy as np

    outcome_N = modality.outcomes(build, split, task, answers)
    if not np.isfinite(outcome_N).all():
        example = int(np.argmin(np.isfinite(outcome_N)))
        raise UserError(
            f"{where}/{task}: the outcome of example {example} is {outcome_N[example]}, which no interval "
            "can hold; have the modality give such an answer its worst score"
        )
    return outcome_N
