"""How image models are measured: the image tower on every task, by its cosines with the task's zero-shot head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step, dataset, dataset_lineage, dataset_paths
from mergeline.tasks.modality import Classes, Evaluator, Json, Modality
from mergeline.tasks.step import Stage, StageTemplate, Step

if TYPE_CHECKING:
    import numpy as np

    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.clip.params import ClipParams
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served

_BUILD = Path("build")


def _data(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.datasets import prepare

    datasets = cast("ClipParams", params).datasets
    assert stage.item
    prepare(datasets.all[stage.item], Path(stage.out), datasets.image_size)


def _heads(params: Params, stage: Stage) -> None:
    from mergeline.tasks.clip.heads import write_heads

    base, suite = _BUILD / "checkpoints" / params.base, Path(cast("ClipParams", params).suite)
    datasets = {task: dataset(_BUILD, task) for task in params.tasks}
    write_heads(base, suite, datasets, Path(stage.out), params.device)


class Clip(Modality):
    """Image towers of CLIP; an outcome is 1 where the class with the largest cosine is the image's."""

    name = "clip"
    hub_task = "zero-shot-image-classification"
    models = "image models with datasets and suite"
    sections = ("datasets", "suite")
    deps = (
        "build/data",
        "build/heads.safetensors",
        "${code}/evaluation/clip",
        "${code}/evaluation/datasets.py",
        "${code}/evaluation/pixels.py",
        "${code}/evaluation/splits.py",
        "${code}/tasks/clip",
    )
    compare_deps = ("build/data", "${code}/tasks/clip")
    in_memory = True
    steps = (
        data_step(
            "datasets",
            _data,
            ("${code}/evaluation/datasets.py", "${code}/evaluation/splits.py"),
            "datasets.image_size",
        ),
        Step(
            "heads",
            "make the zero-shot heads of all tasks",
            _heads,
            (
                StageTemplate(
                    "heads",
                    deps=(
                        "build/checkpoints/${base}",
                        "build/data",
                        "${suite}",
                        "${code}/evaluation/clip",
                        "${code}/tasks/clip",
                    ),
                    params=("base", "suite"),
                    outs=("build/heads.safetensors",),
                ),
            ),
        ),
    )

    def schema(self) -> type[Params]:
        from mergeline.tasks.clip.params import ClipParams

        return ClipParams

    def in_parts(self, params: Params) -> bool:
        return True

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.clip.evaluator import ClipEvaluator, open_evaluator

        base = build / "checkpoints" / params.base
        return ClipEvaluator(open_evaluator(params, build, like), base, params.owners, params.device)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        import numpy as np

        return (answers == np.load(dataset(build, task) / f"{split}_y.npy")).astype(np.float64)

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        return dataset_lineage(workspace, board, digests)

    def files(self, params: Params) -> dict[str, str]:
        return {"suite": cast("ClipParams", params).suite}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return dataset_paths("datasets", cast("ClipParams", params).datasets)

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> np.ndarray:
        from mergeline.evaluation.datasets import load

        return load(dataset(build, task)).split(split)[0][index]

    def classes(self, params: Params, build: Path, split: str, task: str) -> Classes | None:
        """By the names that the heads were made of."""
        from mergeline.evaluation.clip.suite import load_suite
        from mergeline.evaluation.datasets import load

        data = load(dataset(build, task))
        suite = load_suite(build.parent / cast("ClipParams", params).suite).tasks
        names = (task in suite and suite[task].classnames) or data.classnames
        return Classes(names, data.split(split)[1]) if names else None

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.clip.serving import served

        return served(self, cast("ClipParams", params), build)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.clip.serving import predictor

        return predictor

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        from mergeline.tasks.clip.learning import network

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        from mergeline.tasks.clip.learning import examples

        return examples

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.datasets import load
        from mergeline.evaluation.splits import choosing

        return choosing(load(dataset(build, task)).fits_val)
