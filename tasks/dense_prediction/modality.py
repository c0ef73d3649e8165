"""How models of every pixel are measured: a trunk under the head of each task's own expert, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from mergeline.tasks.data_step import data_step, dataset, dataset_lineage, dataset_paths
from mergeline.tasks.modality import Evaluator, Json, Modality
from mergeline.tasks.step import Stage

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.tasks.dense_prediction.params import DensePredictionParams
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.gates import Gates
    from mergeline.tasks.schema import Params

_CODE = ("${code}/evaluation/dense_prediction", "${code}/tasks/dense_prediction")


def _prepare(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.dense_prediction.data import prepare

    settings = cast("DensePredictionParams", params).dense_prediction
    assert stage.item
    prepare(settings.data.all[stage.item], Path(stage.out), settings.tasks[stage.item], settings.size)


class DensePrediction(Modality):
    """Semantic segmentation, depth, normals, restoration of images; an outcome is the score of an image."""

    name = "dense_prediction"
    models = "models of every pixel with dense_prediction"
    sections = ("dense_prediction",)
    measure = "score"
    deps = (
        "build/data",
        "build/checkpoints",  # heads are those of the experts
        "${code}/evaluation/pixels.py",
        "${code}/evaluation/pretrained.py",
        "${code}/tasks/heads.py",
        *_CODE,
    )
    params = ("dense_prediction",)
    compare_deps = ("build/data", *_CODE)
    merge_params = ("dense_prediction.heads",)
    steps = (
        data_step(
            "dense_prediction.data",
            _prepare,
            (
                "${code}/evaluation/dense_prediction/data.py",
                "${code}/evaluation/datasets.py",
                "${code}/evaluation/splits.py",
            ),
            "dense_prediction.image_size",
            "dense_prediction.tasks.${key}",
        ),
    )

    def schema(self) -> type[Params]:
        from mergeline.tasks.dense_prediction.params import DensePredictionParams

        return DensePredictionParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.dense_prediction.evaluator import DenseEvaluator
        from mergeline.tasks.dense_prediction.family import Family

        return DenseEvaluator(Family(cast("DensePredictionParams", params), build), build)

    def heads(self, params: Params, build: Path) -> list[str]:
        from mergeline.tasks.dense_prediction.family import Family

        return Family(cast("DensePredictionParams", params), build).patterns

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        from mergeline.evaluation.dense_prediction.data import load

        return load(dataset(build, task)).task.outcomes(answers)

    def measures(self, params: Params) -> dict[str, Measure]:
        tasks = cast("DensePredictionParams", params).dense_prediction.tasks
        return {task: tasks[task].measure for task in params.tasks}

    def gates(self) -> type[Gates]:
        from mergeline.tasks.custom.params import ScoreGates

        return ScoreGates

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        return dataset_lineage(workspace, board, digests)

    def settings(self, params: Params) -> Json:
        return {"heads": "each task's own expert's"}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        section = cast("DensePredictionParams", params).dense_prediction
        return dataset_paths("dense_prediction.data", section.data)

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> np.ndarray:
        """The image, and right of it its target."""
        from mergeline.evaluation.dense_prediction.data import load
        from mergeline.evaluation.dense_prediction.pictures import beside

        own = load(dataset(build, task))
        x, y = own.split(split)
        return beside(x[index], y[index], own.task.target)
