"""How sequence-to-sequence models are measured: by the texts that they write, beside the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step, dataset, dataset_paths
from mergeline.tasks.modality import Evaluator, Json, Known, Modality
from mergeline.tasks.step import Stage

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.measures import Measure
    from mergeline.evaluation.pages.page import Section
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.digests import Digests
    from mergeline.tasks.schema import Params
    from mergeline.tasks.text2text.params import Text2TextParams

_TABLES = ("${code}/evaluation/splits.py", "${code}/evaluation/tables.py")


def _data(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.tables import prepare_table

    assert stage.item
    prepare_table(cast("Text2TextParams", params).text2text.data.all[stage.item], Path(stage.out))


class Text2Text(Modality):
    """Encoders with a decoder, such as T5 and BART; an outcome is the score of what one writes to an example."""

    name = "text2text"
    models = "sequence-to-sequence models with text2text"
    sections = ("text2text",)
    measure = "score"
    deps = (
        "build/data",
        "${code}/evaluation/pretrained.py",
        *_TABLES,
        "${code}/evaluation/text2text",
        "${code}/tasks/text2text",
    )
    params = ("text2text",)
    compare_deps = ("build/data", *_TABLES, "${code}/evaluation/text2text", "${code}/tasks/text2text")
    steps = (data_step("text2text.data", _data, _TABLES),)

    def schema(self) -> type[Params]:
        from mergeline.tasks.text2text.params import Text2TextParams

        return Text2TextParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.text2text.evaluator import TextEvaluator

        return TextEvaluator(cast("Text2TextParams", params), build)

    def check(self, base: Path) -> None:
        from mergeline.evaluation.pretrained import load_tokenizer
        from mergeline.evaluation.text2text.models import refuse_other_kinds

        refuse_other_kinds(base)
        load_tokenizer(base)

    def outcomes(self, build: Path, split: str, task: str, answers: np.ndarray) -> np.ndarray:
        from mergeline.evaluation.text2text.metrics import outcomes

        return outcomes(answers)

    def measures(self, params: Params) -> dict[str, Measure]:
        """The metric of each task."""
        from mergeline.evaluation.measures import Measure

        section = cast("Text2TextParams", params).text2text
        return {task: Measure(section.task(task).metric.replace("_", " ")) for task in params.tasks}

    def lineage(self, workspace: Path, board: Json, digests: Digests) -> dict[str, str]:
        """A digest of the table and of how its texts are made and scored."""
        from mergeline.merging.canonical import text_digest
        from mergeline.tasks.leaderboard import present

        folders = {task: present(dataset(workspace / "build", task)) for task in board["tasks"]}
        settings = board["text2text"]
        return {
            f"lineage.data.{task}": text_digest([str(digests.of(folder)), settings[task]])
            for task, folder in folders.items()
        }

    def settings(self, params: Params) -> Json:
        section = cast("Text2TextParams", params).text2text
        return {"text2text": {task: section.task(task).model_dump(mode="json") for task in params.tasks}}

    def paths(self, params: Params) -> dict[tuple[str, ...], str]:
        return dataset_paths("text2text.data", cast("Text2TextParams", params).text2text.data)

    def row(self, params: Params, name: str, known: Known) -> Json:
        """Texts that it wrote, the share of those that are no number and should be, and how many inputs were cut."""
        return {key: known.scores[key] for key in ("samples", "no_number", "cut") if key in known.scores}

    def metrics(self, row: Json) -> dict[str, float]:
        return {f"no_number.{task}": share for task, share in row.get("no_number", {}).items()}

    def report(self, board: Json) -> Section:
        from mergeline.evaluation.text2text.section import section

        return section(board)

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        from mergeline.tasks.text2text.learning import network

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        from mergeline.tasks.text2text.learning import examples

        return examples

    def choosing(self, build: Path, task: str) -> slice:
        from mergeline.evaluation.splits import choosing
        from mergeline.evaluation.tables import load_table

        return choosing(load_table(dataset(build, task)).fits_val)
