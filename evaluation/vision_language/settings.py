"""What a task of images and questions is: what is asked of each row of a table, and how what is written is scored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergeline.evaluation.text2text.settings import Template
from mergeline.evaluation.vision_language.boxes import Box
from mergeline.evaluation.vision_language.metrics import BOX_METRICS, MetricName


class Task(BaseModel):
    """An entry of `vision_language.tasks` of params.yaml.

    image: the column of images. question: the column of what is asked, or template: a text with {column} places that
    makes it from a row. target: the column of the right answer, or of a list of them. metric: see metrics.py beside
    this. normalise: `lower` compares in lower case, for metrics that do not by themselves. target_box, written_box: how
    the table has boxes, and how the models write them. max_new_tokens: of an answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = "image"
    question: str = "question"
    template: Template | None = None
    target: str = "target"
    metric: MetricName = "exact_match"
    normalise: Literal["none", "lower"] = "none"
    target_box: Box | None = None
    written_box: Box | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] = 16

    @model_validator(mode="after")
    def _says_what_boxes_are(self) -> Self:
        declared = [self.target_box, self.written_box]
        if self.metric in BOX_METRICS and None in declared:
            raise ValueError(
                f"{self.metric} compares boxes; say how the table and the models have them: target_box: {{scale: "
                "pixels}, written_box: {scale: 1000}"
            )
        if self.metric not in BOX_METRICS and declared != [None, None]:
            raise ValueError(f"{self.metric} compares no boxes; leave target_box and written_box out")
        return self
