"""How classifiers are measured: one trunk, under the head of each task's own expert, by the label of every example."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step, dataset, dataset_lineage, dataset_paths
from mergeline.tasks.modality import Classes, Evaluator, Json, Known, Modality
from mergeline.tasks.step import Stage

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.classifiers.data import Data
    from mergeline.tasks.classifiers.family import Family
    from mergeline.tasks.classifiers.params import (
        ClassifierParams,
        ImageClassifierParams,
        TextClassifierParams,
    )
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served

_DATA = ("build/data", "build/checkpoints")  # heads are those of the experts
_CODE = (
    "${code}/evaluation/classifiers",
    "${code}/evaluation/splits.py",
    "${code}/tasks/classifiers",
    "${code}/tasks/heads.py",
)


class _Classifiers(Modality):
    """An outcome is 1 where the likeliest class is the label; of a number, what it adds to Spearman's correlation."""

    compare_deps = ("build/data", "${code}/tasks/classifiers")

    @abstractmethod
    def data(self, params: ClassifierParams, build: Path, family: Family) -> Data:
        """The examples in `build` (raises UserError)."""

    def _family(self, params: Params, build: Path) -> Family:
        from mergeline.tasks.classifiers.family import Family

        return Family(cast("ClassifierParams", params), build)

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.classifiers.evaluator import ClassifierEvaluator

        family = self._family(params, build)
        return ClassifierEvaluator(family, self.data(family.params, build, family))

    def in_parts(self, params: Params) -> bool:
        from mergeline.evaluation.measures import ACCURACY

        return all(measure == ACCURACY for measure in self.measures(params).values())

    def heads(self, params: Params, build: Path) -> list[str]:
        return self._family(params, build).patterns

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        from mergeline.evaluation.classifiers.texts import load_labels
        from mergeline.evaluation.metrics import spearman_outcomes

        labels = load_labels(dataset(build, task), split)
        if labels.dtype.kind == "f":
            return spearman_outcomes(answers, labels)
        return (answers == labels).astype("float64")

    def measures(self, params: Params) -> dict[str, Measure]:
        from mergeline.evaluation.measures import ACCURACY

        return dict.fromkeys(params.tasks, ACCURACY)

    def classes(self, params: Params, build: Path, split: str, task: str) -> Classes | None:
        from mergeline.evaluation.classifiers.texts import load_labels

        labels, names = load_labels(dataset(build, task), split), self.label_names(build, task)
        if labels.dtype.kind == "f":
            return None
        return Classes(names or [str(i) for i in range(int(labels.max()) + 1)], labels)

    @abstractmethod
    def label_names(self, build: Path, task: str) -> list[str] | None:
        """What the labels of a task are called, if they have names."""

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        return dataset_lineage(workspace, board, digests)

    def settings(self, params: Params) -> Json:
        return {"heads": "each task's own expert's"}

    def row(self, params: Params, name: str, known: Known) -> Json:
        """The tasks whose classes were told by their names, not by their numbers."""
        return {key: known.scores[key] for key in ("labels_by_name",) if key in known.scores}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return dataset_paths(f"{self.name}.data", cast("ClassifierParams", params).classification.data)

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        def network(params: Params, build: Path, like: Path) -> Network:
            from mergeline.tasks.classifiers.learning import network_of

            family = self._family(params, build)
            return network_of(family, self.data(family.params, build, family))

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        def examples(params: Params, build: Path, split: str = "fit") -> Examples:
            from mergeline.tasks.classifiers.learning import examples_of

            family = self._family(params, build)
            return examples_of(family, self.data(family.params, build, family), split)

        return examples


def _prepare_images(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.datasets import prepare

    settings = cast("ImageClassifierParams", params).image_classification
    assert stage.item
    prepare(settings.data.all[stage.item], Path(stage.out), settings.image_size)


class ImageClassifiers(_Classifiers):
    """Image classifiers of transformers, timm and torchvision."""

    name = "image_classification"
    hub_task = "image-classification"
    models = "image classifiers with image_classification"
    sections = ("image_classification",)
    deps = (*_DATA, "${code}/evaluation/datasets.py", "${code}/evaluation/pixels.py", *_CODE)
    params = ("image_classification",)
    merge_params = ("image_classification.heads",)
    steps = (
        data_step(
            "image_classification.data",
            _prepare_images,
            ("${code}/evaluation/datasets.py", "${code}/evaluation/splits.py"),
            "image_classification.image_size",
        ),
    )

    def schema(self) -> type[Params]:
        from mergeline.tasks.classifiers.params import ImageClassifierParams

        return ImageClassifierParams

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> np.ndarray:
        from mergeline.evaluation.datasets import load

        return load(dataset(build, task)).split(split)[0][index]

    def label_names(self, build: Path, task: str) -> list[str] | None:
        from mergeline.evaluation.datasets import load

        return load(dataset(build, task)).classnames

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.datasets import load
        from mergeline.evaluation.splits import choosing

        return choosing(load(dataset(build, task)).fits_val)

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.classifiers.serving import served_images

        names = {task: self.label_names(build, task) for task in params.tasks}
        return served_images(self._family(params, build), names)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.classifiers.serving import predictor_of_images

        return predictor_of_images

    def data(self, params: ClassifierParams, build: Path, family: Family) -> Data:
        from mergeline.tasks.classifiers.data import Images

        return Images(cast("ImageClassifierParams", params), build, family)


def _prepare_texts(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.classifiers.texts import prepare_texts

    settings = cast("TextClassifierParams", params).text_classification
    assert stage.item
    columns = settings.columns[stage.item]
    prepare_texts(settings.data.all[stage.item], Path(stage.out), columns.label, columns.target == "number")


class TextClassifiers(_Classifiers):
    """Text classifiers of transformers (GLUE and the like)."""

    name = "text_classification"
    hub_task = "text-classification"
    models = "text classifiers with text_classification"
    sections = ("text_classification",)
    deps = (*_DATA, "${code}/evaluation/tables.py", "${code}/evaluation/pretrained.py", *_CODE)
    params = ("text_classification",)
    merge_params = ("text_classification.heads",)
    steps = (
        data_step(
            "text_classification.data",
            _prepare_texts,
            (
                "${code}/evaluation/tables.py",
                "${code}/evaluation/splits.py",
                "${code}/evaluation/classifiers",
            ),
            "text_classification.columns.${key}",
        ),
    )

    def schema(self) -> type[Params]:
        from mergeline.tasks.classifiers.params import TextClassifierParams

        return TextClassifierParams

    def measures(self, params: Params) -> dict[str, Measure]:
        from mergeline.evaluation.measures import ACCURACY, Measure

        columns = cast("TextClassifierParams", params).text_classification.columns
        numbers = {task for task in params.tasks if columns[task].target == "number"}
        return {t: Measure("Spearman correlation") if t in numbers else ACCURACY for t in params.tasks}

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> str:
        from mergeline.evaluation.tables import load_table

        columns = cast("TextClassifierParams", params).text_classification.columns[task]
        row = load_table(dataset(build, task)).rows(split)[index]
        return " | ".join(str(row[column]) for column in (columns.text, columns.pair) if column)

    def label_names(self, build: Path, task: str) -> list[str] | None:
        from mergeline.evaluation.classifiers.texts import label_names

        return label_names(dataset(build, task))

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.splits import choosing
        from mergeline.evaluation.tables import load_table

        return choosing(load_table(dataset(build, task)).fits_val)

    def served(self, params: Params, build: Path, merge: Path) -> Served | str:
        from mergeline.tasks.classifiers.serving import served_texts

        names = {task: self.label_names(build, task) for task in params.tasks}
        return served_texts(self._family(params, build), names, merge)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.classifiers.serving import predictor_of_texts

        return predictor_of_texts

    def data(self, params: ClassifierParams, build: Path, family: Family) -> Data:
        from mergeline.tasks.classifiers.data import Texts

        return Texts(cast("TextClassifierParams", params), build, family)
