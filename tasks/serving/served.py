"""What a registered model predicts from, and how it is opened where it is served.

Beside its files lies `served.json`, which says of what modality it is and with what settings it was measured, and what
else of the workspace it needs, such as zero-shot heads. Code comes from the Mergeline that is installed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from mergeline.merging.errors import UserError
from mergeline.merging.files import link_or_copy, read_object, write_json
from mergeline.tasks.modalities import modality_named

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params
    from mergeline.tasks.serving.contract import Predict, Served

_SERVED = "served.json"


def write_served(folder: Path, modality: Modality, served: Served) -> None:
    """Write what lies beside a model's files into a folder."""
    folder.mkdir(parents=True)
    write_json(folder / _SERVED, {"modality": modality.name, "settings": dict(served.settings)})
    for name, file in served.files.items():
        link_or_copy(file, folder / name)


def open_served(model: Path, beside: Path) -> Predict:
    """What predicts with the files of a model, and what was written beside it.

    Raises:
        UserError: its modality is not known here; it does not open.
    """
    found = read_object(beside / _SERVED)
    predictor = modality_named(str(found.get("modality"))).predictor
    if predictor is None:
        raise UserError(f"{beside / _SERVED}: models of '{found.get('modality')}' are not served")
    return predictor(model, beside, found["settings"])


def served(
    modality: Modality, params: Params, build: Path, merge: Path, row: Mapping[str, Any]
) -> Served | str:
    """How a merge is served, or why it is not. row: of the leaderboard."""
    if "at_use" in row:
        return "the task of an input is known, or found, when it is used"
    return modality.served(params, build, merge)
