"""How embedding models are measured: by the similarity of pairs of texts, and by the documents that queries find."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step, dataset, dataset_paths
from mergeline.tasks.modality import Evaluator, Json, Modality
from mergeline.tasks.step import Stage

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.embeddings.params import EmbeddingParams
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served

_TABLES = (
    "${code}/evaluation/tables.py",
    "${code}/evaluation/splits.py",
    "${code}/evaluation/embeddings/data.py",
    "${code}/evaluation/embeddings/mteb_tables.py",
)


def _data(params: Params, stage: Stage) -> None:
    import tempfile

    from mergeline.evaluation.embeddings.data import beside, check
    from mergeline.evaluation.embeddings.mteb_tables import MTEB, write_mteb_tables
    from mergeline.evaluation.tables import prepare_table

    settings = cast("EmbeddingParams", params).embeddings
    assert stage.item
    task = settings.tasks[stage.item]
    source = settings.data.all[stage.item]
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith(MTEB):
            source = str(write_mteb_tables(source, task, Path(folder)))
        prepare_table(source, Path(stage.out), beside(task))
    check(Path(stage.out), task)


class EmbeddingModels(Modality):
    """Models of sentence-transformers; an outcome is a query's nDCG@10, or what a pair adds to Spearman's rho."""

    name = "embeddings"
    hub_task = "sentence-similarity"
    models = "embedding models with embeddings"
    sections = ("embeddings",)
    measure = "score"
    deps = (
        "build/data",
        "${code}/evaluation/embeddings",
        "${code}/evaluation/pretrained.py",
        "${code}/evaluation/tables.py",
        "${code}/tasks/embeddings",
    )
    params = ("embeddings",)
    compare_deps = ("build/data", "${code}/evaluation/embeddings", "${code}/tasks/embeddings")
    in_memory = True
    steps = (data_step("embeddings.data", _data, _TABLES, "embeddings.tasks.${key}"),)

    def schema(self) -> type[Params]:
        from mergeline.tasks.embeddings.params import EmbeddingParams

        return EmbeddingParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.embeddings.evaluator import EmbeddingEvaluator

        return EmbeddingEvaluator(cast("EmbeddingParams", params), build, like)

    def check(self, base: Path) -> None:
        from mergeline.evaluation.embeddings.models import refuse_other_kinds

        refuse_other_kinds(base)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        from mergeline.evaluation.embeddings.scores import outcomes

        return outcomes(answers)

    def measures(self, params: Params) -> dict[str, Measure]:
        from mergeline.evaluation.measures import Measure

        names = {"retrieval": "nDCG@10", "similarity": "Spearman correlation"}
        tasks = cast("EmbeddingParams", params).embeddings.tasks
        return {task: Measure(names[tasks[task].kind]) for task in params.tasks}

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of a task's table and of how it is measured."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present

        settings, found = board["embeddings"], {}
        for task in board["tasks"]:
            table = str(digests.of(present(dataset(workspace / "build", task))))
            how = [settings["tasks"][task], settings["prompts"].get(task, {})]
            found[f"lineage.data.{task}"] = text_digest([task, table, how])
        return found

    def settings(self, params: Params) -> Json:
        told = cast("EmbeddingParams", params).embeddings.model_dump(mode="json")
        return {"embeddings": {"tasks": told["tasks"], "prompts": told["prompts"]}}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return dataset_paths("embeddings.data", cast("EmbeddingParams", params).embeddings.data)

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.embeddings.serving import served

        return served(cast("EmbeddingParams", params).embeddings.batch_size)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.embeddings.serving import predictor

        return predictor

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        from mergeline.tasks.embeddings.learning import network

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        from mergeline.tasks.embeddings.learning import examples

        return examples

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.splits import choosing
        from mergeline.evaluation.tables import load_table

        return choosing(load_table(dataset(build, task)).fits_val)
