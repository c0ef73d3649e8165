"""Folders of several checkpoints: pipelines of diffusers, and models of sentence-transformers with weights in modules.

A component lies in a sub-folder, whose name stands before those of its tensors: `unet/conv_in.weight`. Tensors of the
folder itself have their own names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable

from mergeline.merging.checkpoints.companions import CONFIG, PICKLE_SUFFIXES
from mergeline.merging.checkpoints.modules import read_modules
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.reading import safe_name

PIPELINE = "model_index.json"


def component_folders(folder: Path) -> list[str]:
    """The names of the sub-folders that hold weights of the whole, sorted; none of a folder of one checkpoint.

    Raises:
        UserError: what lists them is damaged or names a folder elsewhere; weights are there as a pickle alone.
    """
    modules = [m.folder for m in read_modules(folder) if m.folder and m.is_known]
    return sorted({name for name in [*parts_of_pipeline(folder), *modules] if _has_weights(folder, name)})


def parts_of_pipeline(folder: Path) -> list[str]:
    """The sub-folders that the model_index.json of diffusers names, sorted; none where there is no such file.

    Raises:
        UserError: it is no JSON object, or names a folder elsewhere.
    """
    listed = read_object(folder / PIPELINE)
    names = [
        name for name, value in listed.items() if isinstance(value, list) and len(value) == 2 and all(value)
    ]
    return sorted(name for name in names if safe_name(folder, name, folder / PIPELINE).is_dir())


def component_of(name: str, components: Iterable[str]) -> str:
    """What stands before a tensor's name in its component: `unet/`, or nothing for the folder's own."""
    before, slash, _ = name.partition("/")
    return before + slash if slash and before in components else ""


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of a folder and of each of its components, by what stands before the names of tensors.

    Raises:
        UserError: as `component_folders`; a configuration that is no JSON object.
    """
    return {"": read_object(folder / CONFIG)} | {
        f"{name}/": read_object(folder / name / CONFIG) for name in component_folders(folder)
    }


def _has_weights(folder: Path, name: str) -> bool:
    place = folder / name
    files = [path.name for path in place.iterdir()] if place.is_dir() else []
    if any(file.endswith(".safetensors") for file in files):
        return True
    pickles = sorted(file for file in files if file.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise UserError(
            f"{folder}: '{name}/{pickles[0]}' is a pickle, which can run code when it is opened; save the model again "
            "as safetensors"
        )
    return False
