"""Models of images and texts where they are served: what one writes to an image and a question."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.tasks.serving.contract import MAX_NEW_TOKENS, TEXT, Row, Served, image_of, text_of

if TYPE_CHECKING:
    from mergeline.tasks.modality import Json
    from mergeline.tasks.serving.contract import Predict


def served(prompt: str | None) -> Served:
    """Inputs are images and questions, put into the prompt that models were measured with; answers are texts."""
    inputs = {"image": TEXT, "question": TEXT}
    return Served(inputs, {"text": TEXT}, {"prompt": prompt}, parameters={MAX_NEW_TOKENS: 16})


def predictor(model: Path, beside: Path, settings: Json) -> Predict:
    """What writes with the model and the processor in a folder (raises UserError)."""
    from mergeline.evaluation.vision_language.models import load_reader

    reader = load_reader(model, settings["prompt"])

    def predict(rows: Sequence[Row], parameters: Mapping[str, Any]) -> list[Json]:
        longest, found = int(parameters.get(MAX_NEW_TOKENS, 16)), []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.png"
            for row in rows:
                image_of(row).save(file)
                found += reader.write([file], [text_of(row, "question")], longest, 1)
        return [{"text": text} for text in found]

    return predict
