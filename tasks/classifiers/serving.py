"""Classifiers where they are served: an image, or a text, to the likeliest class by the head of its task."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence, cast

from mergeline.merging.errors import UserError
from mergeline.tasks.serving.contract import (
    NUMBER,
    OPTIONAL_TEXT,
    TEXT,
    Row,
    Served,
    image_of,
    task_of,
    text_of,
)

if TYPE_CHECKING:
    from mergeline.evaluation.classifiers.model import Classifier
    from mergeline.tasks.classifiers.family import Family
    from mergeline.tasks.classifiers.params import ImageClassifierParams, TextClassifierParams
    from mergeline.tasks.modality import Json
    from mergeline.tasks.serving.contract import Predict

_OUTPUTS = {"label": TEXT, "score": NUMBER}
_IMAGES, _TEXTS = "AutoModelForImageClassification", "AutoModelForSequenceClassification"


def served_images(family: Family, names: Mapping[str, list[str] | None]) -> Served:
    """Inputs are images and their tasks. names: task -> what the data call its labels."""
    from mergeline.evaluation.pixels import normalisation

    own = cast("ImageClassifierParams", family.params).image_classification
    mean, std = normalisation(family.folders, own.model, own.mean, own.std, "image_classification")
    settings = {"image_size": own.image_size, "mean": list(mean), "std": list(std)}
    inputs = {"image": TEXT, "task": OPTIONAL_TEXT}
    return Served(inputs, _OUTPUTS, settings | _common(family, names))


def served_texts(family: Family, names: Mapping[str, list[str] | None], merge: Path) -> Served | str:
    """Inputs are texts, maybe pairs, and their tasks; or why there are none."""
    from mergeline.evaluation.pretrained import load_tokenizer

    own = cast("TextClassifierParams", family.params).text_classification
    try:
        load_tokenizer(merge)
    except UserError as error:
        return str(error)
    inputs = {"text": TEXT, "pair": OPTIONAL_TEXT, "task": OPTIONAL_TEXT}
    return Served(inputs, _OUTPUTS, {"max_length": own.max_length} | _common(family, names))


def _common(family: Family, names: Mapping[str, list[str] | None]) -> Json:
    """Of each task: whose head it has, and what its classes are called, in the order of the head."""
    from mergeline.evaluation.classifiers.labels import matched
    from mergeline.merging.checkpoints.heads import outputs

    tasks = {}
    for task, expert in family.params.owners.items():
        count, config = outputs(family.heads[task]), family.config(task)
        labels = names[task] or [str(i) for i in range(count)]
        order = matched(task, config, count, names[task]) if count > 1 else None
        tasks[task] = {"expert": expert, "labels": [labels[i] for i in order] if order else labels}
    return {"model": family.params.classification.model, "tasks": tasks}


def predictor_of_images(model: Path, beside: Path, settings: Json) -> Predict:
    """What predicts with the trunk and the heads in a folder (raises UserError)."""
    from mergeline.evaluation.datasets import square_pixels
    from mergeline.evaluation.pixels import Pixels

    classifier = _opened(model, settings, _IMAGES)
    pixels = Pixels(settings["mean"], settings["std"], "cpu")

    def predict(rows: Sequence[Row], _: Mapping[str, Any]) -> list[Json]:
        found = []
        for row in rows:
            task = task_of(row, [*settings["tasks"]])
            x_1HWC = square_pixels(image_of(row), settings["image_size"])[None]
            found.append(_answered(classifier, {"images": pixels(x_1HWC)}, task, settings))
        return found

    return predict


def predictor_of_texts(model: Path, beside: Path, settings: Json) -> Predict:
    """What predicts with the trunk, the heads and the tokenizer in a folder (raises UserError)."""
    from mergeline.evaluation.classifiers.texts import Tokens
    from mergeline.evaluation.pretrained import load_tokenizer

    classifier = _opened(model, settings, _TEXTS)
    tokens = Tokens(load_tokenizer(model), settings["max_length"], "cpu")

    def predict(rows: Sequence[Row], _: Mapping[str, Any]) -> list[Json]:
        found = []
        for row in rows:
            task = task_of(row, [*settings["tasks"]])
            pair = [text_of(row, "pair")] if "pair" in row else None
            batch = tokens([text_of(row, "text")], pair)
            found.append(_answered(classifier, batch, task, settings))
        return found

    return predict


def _opened(model: Path, settings: Json, kind: str) -> Classifier:
    """The trunk in a folder under its heads; the libraries open it with one of them put back."""
    from mergeline.evaluation.classifiers.model import Classifier, build
    from mergeline.merging.checkpoints.heads import read_head
    from mergeline.merging.export import export_task

    heads = {}
    for task, own in settings["tasks"].items():
        checkpoint, _ = read_head(model, own["expert"])
        heads[task] = {name: checkpoint.read(name) for name in checkpoint.tensors}
    first = next(iter(settings["tasks"]))
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model"
        export_task(model, settings["tasks"][first]["expert"], whole)
        module = build(whole, settings["model"], kind, heads[first], "cpu")
    config: Any = getattr(module, "config", None)
    if config is not None and getattr(config, "pad_token_id", 0) is None:
        from mergeline.evaluation.classifiers.texts import Tokens
        from mergeline.evaluation.pretrained import load_tokenizer

        config.pad_token_id = Tokens(load_tokenizer(model), settings["max_length"], "cpu").pad_id
    return Classifier(module, heads)


def _answered(classifier: Classifier, batch: Mapping[str, Any], task: str, settings: Json) -> Json:
    """The likeliest class and its probability; of a head with one number that number, as both."""
    import torch

    with torch.inference_mode():
        logit_C = classifier.logits(classifier.features(batch, task), task)[0].float()
    if len(logit_C) == 1:
        return {"label": f"{float(logit_C):.6g}", "score": float(logit_C)}
    p_C = logit_C.softmax(0)
    best = int(p_C.argmax())
    return {"label": settings["tasks"][task]["labels"][best], "score": float(p_C[best])}
