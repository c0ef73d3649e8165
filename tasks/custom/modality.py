"""How models of any kind are measured: by a function or command of the user's, example by example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence, cast

from mergeline.merging.errors import UserError
from mergeline.tasks.modality import Evaluation, Evaluator, Json, Known, Modality, Model

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.tasks.custom.params import CustomParams
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.gates import Gates
    from mergeline.tasks.schema import Params

_IDS = "examples"  # of scores.json: "SPLIT/TASK" -> the ids of its examples, in the order of the answers


class Custom(Modality):
    """Models of any kind; an outcome is the score of an example, negated where smaller ones are better."""

    name = "custom"
    models = "any models with evaluate"
    sections = ("evaluate",)
    measure = "score"
    deps = (
        "${evaluate.folder}",
        "${code}/evaluation/custom",
        "${code}/evaluation/processes.py",
        "${code}/tasks/custom",
    )
    params = ("evaluate",)
    compare_deps = ("${code}/tasks/custom",)

    def schema(self) -> type[Params]:
        from mergeline.tasks.custom.params import CustomParams

        return CustomParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        return _Evaluator(cast("CustomParams", params), build)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        return answers

    def measures(self, params: Params) -> Mapping[str, Measure]:
        return {task: cast("CustomParams", params).evaluate.measure_of(task) for task in params.tasks}

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of the folder and of the settings."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present

        settings = board["evaluate"]
        folder = digests.of(present(workspace / settings["folder"]))
        return {f"lineage.data.{task}": text_digest([task, folder, settings]) for task in board["tasks"]}

    def settings(self, params: Params) -> Json:
        return {"evaluate": cast("CustomParams", params).evaluate.model_dump(mode="json")}

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Nothing more; but models are compared example by example, so that all must have been given the same ones."""
        own, base = known.scores.get(_IDS, {}), known.base_scores.get(_IDS, {})
        if differing := [key for key in own if own[key] != base[key]]:
            split, _, task = differing[0].partition("/")
            raise UserError(
                f"'{name}' and the base were scored on different examples of '{task}' on {split}: the evaluation must "
                "print the same ids for every model"
            )
        return {}

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> str:
        """Its id."""
        from mergeline.tasks.evaluate import SCORES
        from mergeline.tasks.leaderboard import read_output

        base = read_output(build / "evaluations" / "baselines" / SCORES)["models"]["base"]
        return base[_IDS][f"{split}/{task}"][index]

    def gates(self) -> type[Gates]:
        from mergeline.tasks.custom.params import ScoreGates

        return ScoreGates

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return {("evaluate", "folder"): cast("CustomParams", params).evaluate.folder}


class _Evaluator:
    """Answers are the outcomes of examples in the order of their ids: float64 (N)."""

    def __init__(self, params: CustomParams, build: Path):
        self._params, self._log = params, build.parent / ".mergeline" / "evaluate.log"

    def evaluate(self, model: Model, splits: Sequence[str], tasks: Sequence[str]) -> Evaluation:
        import numpy as np

        from mergeline.evaluation.custom.runner import run

        settings = self._params.evaluate
        answers, ids = {}, {}
        for split in splits if tasks else ():
            found = run(settings, cast(Path, model), split, tasks, self._params.device, self._log)
            for task, scores in found.items():
                turned = settings.measure_of(task).turned
                answers[f"{split}/{task}"] = np.array([*map(turned, scores.values())], np.float64)
                ids[f"{split}/{task}"] = [*scores]
        return Evaluation(answers, {_IDS: ids})
