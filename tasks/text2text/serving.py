"""Sequence-to-sequence models where they are served: what one writes to a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.tasks.serving.contract import MAX_NEW_TOKENS, TEXT, Row, Served, text_of

if TYPE_CHECKING:
    from mergeline.tasks.modality import Json
    from mergeline.tasks.serving.contract import Predict


def served(batch_size: int) -> Served:
    """Inputs are whole texts, as the templates of tasks make them; answers are texts."""
    settings = {"batch_size": batch_size}
    return Served({"source": TEXT}, {"text": TEXT}, settings, parameters={MAX_NEW_TOKENS: 64})


def predictor(model: Path, beside: Path, settings: Json) -> Predict:
    """What writes with the model and the tokenizer in a folder (raises UserError)."""
    from mergeline.evaluation.text2text.models import load_writer

    writer = load_writer(model)

    def predict(rows: Sequence[Row], parameters: Mapping[str, Any]) -> list[Json]:
        longest = int(parameters.get(MAX_NEW_TOKENS, 64))
        sources = [text_of(row, "source") for row in rows]
        return [{"text": text} for text in writer.write(sources, longest, settings["batch_size"]).texts]

    return predict
