"""Which test examples the report shows: those on which the candidate and the base differ most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from mergeline.evaluation.measures import measures_of
from mergeline.evaluation.pages.examples import (
    Example,
    TaskExamples,
    confusion,
    example,
    within_bounds,
)
from mergeline.tasks.evaluate import PREDICTIONS, read_outcomes

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.tasks.modality import Classes, Modality
    from mergeline.tasks.schema import Params

_MOST = 6  # that the candidate does better on, and as many that it does worse on


def shown_examples(
    modality: Modality, params: Params, build: Path, board: dict[str, Any]
) -> list[TaskExamples]:
    """Of every task that a modality can show anything of; of none where evaluations are not here, but elsewhere.

    Raises:
        UserError: the data cannot be read.
    """
    return within_bounds(_examples(modality, params, build, board))


def _examples(
    modality: Modality, params: Params, build: Path, board: dict[str, Any]
) -> Iterator[TaskExamples]:
    from safetensors.numpy import load_file

    candidate, measures = board["candidate"], measures_of(board)
    files = {
        "base": build / "evaluations" / "baselines" / PREDICTIONS,
        candidate: build / "evaluations" / candidate / PREDICTIONS,
    }
    if not all(file.is_file() for file in files.values()):
        return
    base = read_outcomes(modality, build, files["base"], "test", board["tasks"], model="base")
    own = read_outcomes(modality, build, files[candidate], "test", board["tasks"])
    answers = {name: load_file(file) for name, file in files.items()}
    for task in board["tasks"]:
        gain_N = own[task] - base[task]
        classes = modality.classes(params, build, "test", task)
        answered = {
            "base": answers["base"][f"base/test/{task}"],
            candidate: answers[candidate][f"test/{task}"],
        }

        def examples(
            order_N: np.ndarray,
            task: str = task,
            classes: Classes | None = classes,
            answered: dict[str, np.ndarray] = answered,
        ) -> Iterator[Example]:
            for i in map(int, order_N[:_MOST]):
                shown = modality.show(params, build, "test", task, i)
                if shown is not None:
                    scores = {"base": base[task][i], candidate: own[task][i]}
                    caption = (
                        _classes(classes, answered, i) if classes else _scores(measures.of(task), scores)
                    )
                    yield example(shown, caption)

        order_N = gain_N.argsort(kind="stable")
        better, worse = int((gain_N > 0).sum()), int((gain_N < 0).sum())
        largest_N = (-gain_N).argsort(kind="stable")
        found = TaskExamples(
            task,
            better,
            worse,
            gained=[*examples(largest_N[:better])],
            lost=[*examples(order_N[:worse])],
            confusion=classes and confusion(classes.names, classes.label_N, answered[candidate]),
        )
        if found.gained or found.lost or found.confusion:
            yield found


def _classes(classes: Classes, answered: dict[str, np.ndarray], i: int) -> str:
    def name(label: int) -> str:
        return classes.names[label] if 0 <= label < len(classes.names) else "none of the classes"

    said = [f"{model}: {name(int(answer_N[i]))}" for model, answer_N in answered.items()]
    return f"{name(int(classes.label_N[i]))}; {'; '.join(said)}"


def _scores(measure: Measure, outcomes: dict[str, float]) -> str:
    said = [f"{model}: {measure.said(measure.turned(float(x)), '.4g')}" for model, x in outcomes.items()]
    return "; ".join(said)
