"""How sequence-to-sequence models are measured: by the texts that they write, beside the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step
from mergeline.tasks.modality import Evaluator, Json
from mergeline.tasks.step import Stage
from mergeline.tasks.writers.modality import TABLE_CODE, Writers

if TYPE_CHECKING:
    from mergeline.evaluation.pages.page import Section
    from mergeline.merging.learning.network import Examples, Network
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served
    from mergeline.tasks.text2text.params import Text2TextParams


def _data(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.tables import prepare_table

    assert stage.item
    prepare_table(cast("Text2TextParams", params).text2text.data.all[stage.item], Path(stage.out))


class Text2Text(Writers):
    """Encoders with a decoder, such as T5 and BART; an outcome is the score of what one writes to an example."""

    name = "text2text"
    hub_task = "text2text-generation"
    models = "sequence-to-sequence models with text2text"
    sections = ("text2text",)
    deps = (
        "build/data",
        "${code}/evaluation/pretrained.py",
        *TABLE_CODE,
        "${code}/evaluation/text2text",
        "${code}/tasks/text2text",
        "${code}/tasks/writers",
    )
    params = ("text2text",)
    compare_deps = (
        "build/data",
        *TABLE_CODE,
        "${code}/evaluation/text2text",
        "${code}/tasks/text2text",
        "${code}/tasks/writers",
    )
    steps = (data_step("text2text.data", _data, TABLE_CODE),)

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

    def report(self, board: Json) -> Section:
        from mergeline.evaluation.text2text.section import section

        return section(board)

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.text2text.serving import served

        return served(self.section(params).batch_size)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.text2text.serving import predictor

        return predictor

    @property
    def network(self) -> Callable[[Params, Path, Path], Network]:
        from mergeline.tasks.text2text.learning import network

        return network

    @property
    def examples(self) -> Callable[..., Examples]:
        from mergeline.tasks.text2text.learning import examples

        return examples
