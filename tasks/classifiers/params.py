"""What params.yaml holds of classifiers: `image_classification`, or `text_classification`."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Iterator, Literal

from pydantic import BeforeValidator, Field

from mergeline.merging.errors import did_you_mean
from mergeline.merging.recipes.recipe import Patterns
from mergeline.tasks.schema import Name, Params, Problem, Sources, Strict

Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


def _auto(value: object) -> object:
    return value if value != "auto" else None


# Names of the tensors that each expert keeps, as shell patterns; None, written `auto`, where they are found.
Heads = Annotated[Patterns | None, BeforeValidator(_auto)]


class Classification(Strict):
    """What is said of classifiers of any kind.

    model: what the checkpoints are, where they do not say it: `torchvision/NAME` or `timm/NAME`; `auto` where
    config.json says it. heads: names of the tensors that each expert keeps, as shell patterns; `auto`: those of a
    classifier by their names, and those that the base lacks. data: task -> source. suites: expert -> its tasks, which
    share its head; by default the task of its own name.
    """

    model: Annotated[str, Field(pattern=r"^(auto|(timm|torchvision)/[\w.-]+)$")] = "auto"
    heads: Heads
    data: Sources
    suites: dict[Name, Annotated[list[Name], Field(min_length=1)]] = {}
    batch_size: Annotated[int, Field(ge=1)] = 64


class ImageClassification(Classification):
    """Of images, which are stored at image_size x image_size pixels.

    mean, std: by which pixels from 0 to 1 are normalised, channel by channel; by default as the checkpoints say
    (preprocessor_config.json, or timm's config.json), or ImageNet's for torchvision.
    """

    image_size: Annotated[int, Field(ge=8)]
    mean: Channels | None = None
    std: Channels | None = None


class Columns(Strict):
    """The columns of a task's table: a text, maybe the other one of a pair, and the label.

    target: `class`, or `number` where the head gives one number, which is compared by Spearman's correlation.
    """

    text: str
    pair: str | None = None
    label: str = "label"
    target: Literal["class", "number"] = "class"


class TextClassification(Classification):
    """Of texts, or pairs of them. columns: of each task's table. max_length: tokens of a text, the first ones."""

    columns: dict[Name, Columns]
    max_length: Annotated[int, Field(ge=4)] = 128


class ClassifierParams(Params):
    """What both kinds share; a task is measured with the head of its own expert."""

    @property
    @abstractmethod
    def classification(self) -> Classification:
        """Its own section."""

    @cached_property
    def tasks(self) -> list[str]:
        return [*self.classification.data.all]

    @cached_property
    def owners(self) -> dict[str, str]:
        return self.owned(self.classification.suites)

    def _problems(self, section: str) -> Iterator[Problem]:
        found = self.classification
        yield from (([section, *loc], wrong) for loc, wrong in found.data.problems("data"))
        yield from self.headless(section, found.suites, found.data.place)
        yield from super().problems()


class ImageClassifierParams(ClassifierParams):
    """Image classifiers are measured on `image_classification`."""

    image_classification: ImageClassification

    @property
    def classification(self) -> ImageClassification:
        return self.image_classification

    def problems(self) -> Iterator[Problem]:
        yield from self._problems("image_classification")


class TextClassifierParams(ClassifierParams):
    """Text classifiers are measured on `text_classification`."""

    text_classification: TextClassification

    @property
    def classification(self) -> TextClassification:
        return self.text_classification

    def problems(self) -> Iterator[Problem]:
        columns = self.text_classification.columns
        for task in self.tasks:
            if task not in columns:
                place = ["text_classification", "columns"]
                yield (
                    place,
                    f"'{task}' is missing{did_you_mean(task, columns)}; say its columns, as {{text: sentence}}",
                )
        yield from self._problems("text_classification")
