"""How models are measured that read an image and a text: by the texts that they write, beside the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, cast

from mergeline.tasks.data_step import data_step, dataset
from mergeline.tasks.modality import Evaluator, Json
from mergeline.tasks.step import Stage
from mergeline.tasks.writers.modality import TABLE_CODE, Writers

if TYPE_CHECKING:
    import numpy as np

    from mergeline.evaluation.pages.page import Section
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served
    from mergeline.tasks.vision_language.params import VisionLanguageParams

_CODE = (
    *TABLE_CODE,
    "${code}/evaluation/text2text",
    "${code}/evaluation/vision_language",
    "${code}/tasks/vision_language",
    "${code}/tasks/writers",
)


def _data(params: Params, stage: Stage) -> None:
    from mergeline.evaluation.vision_language.images import prepare_images

    section = cast("VisionLanguageParams", params).vision_language
    assert stage.item
    prepare_images(section.data.all[stage.item], Path(stage.out), section.task(stage.item).image)


class VisionLanguageModels(Writers):
    """LLaVA, Qwen2-VL, Idefics3 and the like; an outcome is the score of what one writes to an image and a question.

    They are not run for statistics, and merges are not fitted to them.
    """

    name = "vision_language"
    hub_task = "image-text-to-text"
    models = "models of images and texts with vision_language"
    sections = ("vision_language",)
    deps = ("build/data", "${code}/evaluation/pretrained.py", *_CODE)
    params = ("vision_language",)
    compare_deps = ("build/data", *_CODE)
    steps = (
        data_step(
            "vision_language.data",
            _data,
            (*TABLE_CODE, "${code}/evaluation/vision_language/images.py"),
            "vision_language.tasks.${key}",
        ),
    )

    def schema(self) -> type[Params]:
        from mergeline.tasks.vision_language.params import VisionLanguageParams

        return VisionLanguageParams

    def evaluator(self, params: Params, build: Path, like: Path) -> Evaluator:
        from mergeline.tasks.vision_language.evaluator import ReaderEvaluator

        return ReaderEvaluator(cast("VisionLanguageParams", params), build)

    def check(self, base: Path) -> None:
        from mergeline.evaluation.vision_language.models import load_reading_processor, refuse_other_kinds

        refuse_other_kinds(base)
        load_reading_processor(base)

    def settings(self, params: Params) -> Json:
        """How texts are made and scored, and the prompt, by tasks."""
        prompt = {"prompt": self.section(params).prompt}
        return {self.name: {task: own | prompt for task, own in super().settings(params)[self.name].items()}}

    def served(self, params: Params, build: Path, merge: Path) -> Served:
        from mergeline.tasks.vision_language.serving import served

        return served(self.section(params).prompt)

    @property
    def predictor(self) -> Callable[[Path, Path, Json], Predict]:
        from mergeline.tasks.vision_language.serving import predictor

        return predictor

    def report(self, board: Json) -> Section:
        from mergeline.evaluation.vision_language.section import section

        return section(board)

    def show(self, params: Params, build: Path, split: str, task: str, index: int) -> tuple[np.ndarray, str]:
        """The image, and what is asked of it."""
        import numpy as np

        from mergeline.evaluation.tables import load_table
        from mergeline.evaluation.vision_language.images import open_image
        from mergeline.evaluation.vision_language.questions import asked, pictures

        settings, table = self.section(params).task(task), load_table(dataset(build, task))
        image = open_image(pictures(settings, table, split)[0][index])
        return np.asarray(image), asked(settings, table, split)[index]
