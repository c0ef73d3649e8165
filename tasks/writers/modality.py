"""What modalities share whose models write texts: all but what is read, and by what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.tasks.data_step import dataset, dataset_paths
from mergeline.tasks.modality import Json, Known, Modality

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.schema import Params

TABLE_CODE = ("${code}/evaluation/splits.py", "${code}/evaluation/tables.py")


class Writers(Modality):
    """An outcome is the score of what a model writes to an example.

    The section of params.yaml has the modality's name.
    """

    measure = "score"

    def section(self, params: Params) -> Any:
        """Its section, a `WriterSection`."""
        return getattr(params, self.name)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        from mergeline.evaluation.text2text.metrics import outcomes

        return outcomes(answers)

    def measures(self, params: Params) -> dict[str, Measure]:
        """The metric of each task."""
        from mergeline.evaluation.measures import Measure

        section = self.section(params)
        return {task: Measure(section.task(task).metric.replace("_", " ")) for task in params.tasks}

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of the table and of how its texts are made and scored."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present

        folders = {task: present(dataset(workspace / "build", task)) for task in board["tasks"]}
        settings = board[self.name]
        return {
            f"lineage.data.{task}": text_digest([str(digests.of(folder)), settings[task]])
            for task, folder in folders.items()
        }

    def settings(self, params: Params) -> Json:
        section = self.section(params)
        return {self.name: {task: section.task(task).model_dump(mode="json") for task in params.tasks}}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return dataset_paths(f"{self.name}.data", self.section(params).data)

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Texts that it wrote, the share of those that are no number and should be, and how many inputs were cut."""
        return {key: known.scores[key] for key in ("samples", "no_number", "cut") if key in known.scores}

    def metrics(self, row: Json) -> dict[str, float]:
        return {f"no_number.{task}": share for task, share in row.get("no_number", {}).items()}

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.splits import choosing
        from mergeline.evaluation.tables import load_table

        return choosing(load_table(dataset(build, task)).fits_val)
