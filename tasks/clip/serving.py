"""Image models where they are served: an image to the class of a task with the largest cosine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence, cast

import numpy as np

from mergeline.tasks.clip import places
from mergeline.tasks.serving.contract import NUMBER, OPTIONAL_TEXT, TEXT, Row, Served, image_of, task_of

if TYPE_CHECKING:
    from mergeline.tasks.clip.params import ClipParams
    from mergeline.tasks.modality import Json, Modality
    from mergeline.tasks.serving.contract import Predict

_HEADS = "heads.safetensors"


def served(modality: Modality, params: ClipParams, build: Path) -> Served:
    """Inputs are images, with their task where there are several; answers are classes and their probabilities."""
    classes = {}
    for task in params.tasks:
        found = modality.classes(params, build, "test", task)
        assert found is not None, task  # the heads were made of their names
        classes[task] = found.names
    settings = {"classes": classes, "image_size": params.datasets.image_size}
    return Served(
        inputs={"image": TEXT, "task": OPTIONAL_TEXT},
        outputs={"label": TEXT, "score": NUMBER},
        settings=settings,
        files={_HEADS: places.heads(build)},
    )


def predictor(model: Path, beside: Path, settings: Json) -> Predict:
    """What predicts with the image tower in a folder and the zero-shot heads beside it (raises UserError)."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import normalize

    from mergeline.evaluation.clip.zero_shot import build_tower, load_config, pixels_of
    from mergeline.evaluation.datasets import square_pixels

    tower, scale = build_tower(model)
    pixels = pixels_of(load_config(model), "cpu")
    heads, classes = load_file(beside / _HEADS), cast("dict[str, list[str]]", settings["classes"])

    def predict(rows: Sequence[Row], _: Mapping[str, Any]) -> list[Json]:
        found = []
        for row in rows:
            task = task_of(row, [*classes])
            x_1HWC = square_pixels(image_of(row), settings["image_size"])[None]
            with torch.inference_mode():
                cosine_1C = normalize(tower(pixels(np.array(x_1HWC))), dim=-1) @ heads[task].T
                p_C = (scale * cosine_1C).softmax(1)[0]
            best = int(p_C.argmax())
            found.append({"label": classes[task][best], "score": float(p_C[best])})
        return found

    return predict
