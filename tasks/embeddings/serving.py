"""Embedding models where they are served: a text to a unit vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.errors import UserError, did_you_mean
from mergeline.tasks.serving.contract import OPTIONAL_TEXT, TEXT, VECTOR, Row, Served, text_of

if TYPE_CHECKING:
    from mergeline.tasks.modality import Json
    from mergeline.tasks.serving.contract import Predict

_ROLES = ("query", "document")


def served(batch_size: int) -> Served:
    """Inputs are texts, with a role (query or document) where the model has prompts for these."""
    return Served({"text": TEXT, "role": OPTIONAL_TEXT}, {"vector": VECTOR}, {"batch_size": batch_size})


def predictor(model: Path, beside: Path, settings: Json) -> Predict:
    """What embeds with the model in a folder (raises UserError)."""
    from mergeline.evaluation.embeddings.models import load_model

    embedder = load_model(model)

    def predict(rows: Sequence[Row], _: Mapping[str, Any]) -> list[Json]:
        texts = [text_of(row, "text") for row in rows]
        roles = [str(row.get("role", "")) for row in rows]
        for role in filter(None, roles):
            if role not in _ROLES:
                raise UserError(f"'{role}' is no role{did_you_mean(role, _ROLES)}: query, document, or none")
        vectors: dict[int, list[float]] = {}
        for role in dict.fromkeys(roles):
            which = [i for i, own in enumerate(roles) if own == role]
            x_Nd = embedder.embed([texts[i] for i in which], role, batch_size=settings["batch_size"])
            vectors |= {i: x_d.astype(float).tolist() for i, x_d in zip(which, x_Nd)}
        return [{"vector": vectors[i]} for i in range(len(rows))]

    return predict
