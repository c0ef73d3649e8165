"""The modalities there are, and which one a params.yaml or a leaderboard is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.tasks.classifiers.modality import ImageClassifiers, TextClassifiers
from mergeline.tasks.clip.modality import Clip
from mergeline.tasks.custom.modality import Custom
from mergeline.tasks.dense_prediction.modality import DensePrediction
from mergeline.tasks.embeddings.modality import EmbeddingModels
from mergeline.tasks.language.modality import LanguageModels
from mergeline.tasks.policies.modality import Policies
from mergeline.tasks.text2text.modality import Text2Text
from mergeline.tasks.vision_language.modality import VisionLanguageModels

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

_KNOWN: dict[str, Modality] = {}


def register(modality: Modality) -> None:
    """Make a modality known.

    Raises:
        ValueError: another has its name or one of its sections.
    """
    for other in _KNOWN.values():
        shared = {other.name, *other.sections} & {modality.name, *modality.sections}
        if shared:
            raise ValueError(f"{modality.name}: the modality {other.name} has '{min(shared)}' already")
    _KNOWN[modality.name] = modality


def modalities() -> dict[str, Modality]:
    """All by name, in the order in which they were registered."""
    return dict(_KNOWN)


def modality_of(params: Params) -> Modality:
    """The one whose parameters these are."""
    return next(modality for modality in _KNOWN.values() if type(params) is modality.schema())


def modality_named(name: str) -> Modality:
    """The one of this name (raises UserError)."""
    if name not in _KNOWN:
        raise UserError(f"'{name}' is no modality{did_you_mean(name, _KNOWN)}; run the pipeline again")
    return _KNOWN[name]


register(Clip())
register(LanguageModels())
register(ImageClassifiers())
register(TextClassifiers())
register(EmbeddingModels())
register(Custom())
register(Text2Text())
register(Policies())
register(DensePrediction())
register(VisionLanguageModels())
