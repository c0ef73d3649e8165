"""Folders of several checkpoints: pipelines, models with weights in modules, adapters of several components.

Pipelines are those of diffusers, modules those of sentence-transformers, adapters those of PEFT. A component lies in
a sub-folder, whose name stands before those of its tensors: `unet/conv_in.weight`. Tensors of the folder itself have
their own names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterable

from mergeline.merging.checkpoints.companions import ADAPTER_CONFIG, CONFIG, PICKLE_SUFFIXES
from mergeline.merging.checkpoints.modules import read_modules
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.reading import safe_name

PIPELINE = "model_index.json"
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|image_encoder|prior|vae)(_\d)?")
_OF_OTHERS = (".onnx", ".msgpack", ".h5", ".xml", ".gguf")  # weights, as of ONNX, Flax and OpenVINO


def component_folders(folder: Path) -> list[str]:
    """The names of the sub-folders that hold weights of the whole, sorted; none of a folder of one checkpoint.

    Raises:
        UserError: what lists them is damaged or names a folder elsewhere; weights are there as a pickle alone.
    """
    modules = [m.folder for m in read_modules(folder) if m.folder and m.is_known]
    named = [*parts_of_pipeline(folder), *modules, *adapters_in(folder)]
    return sorted({name for name in named if _has_weights(folder, name)})


def parts_of_pipeline(folder: Path) -> list[str]:
    """The sub-folders that the model_index.json of diffusers names, sorted; none where there is no such file.

    Raises:
        UserError: it is no JSON object, or names a folder elsewhere.
    """
    return [name for name in listed_parts(folder / PIPELINE) if (folder / name).is_dir()]


def adapters_in(folder: Path) -> list[str]:
    """The sub-folders, called as components of diffusers, in which PEFT saved adapters; where no model is around them.

    Raises:
        UserError: a link leads out of the folder.
    """
    if any((folder / name).exists() for name in (PIPELINE, CONFIG, ADAPTER_CONFIG)):
        return []
    found = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return [name for name in found if _COMPONENT.fullmatch(name) and safe_name(folder, name, folder).is_dir()]


def listed_parts(file: Path, shown: str | None = None) -> list[str]:
    """The sub-folders that a model_index.json names, sorted, whether they are there or not; errors call it `shown`.

    Raises:
        UserError: it is no JSON object, or names a folder elsewhere.
    """
    named = shown or str(file)
    listed = read_object(file, named=named)
    parts = [name for name, of in listed.items() if isinstance(of, list) and len(of) == 2 and all(of)]
    for name in parts:
        safe_name(file.parent, name, named)
    return sorted(parts)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline, of which the components alone are opened.

    What lies beside them is the same once more, in one file, for other programs.

    Raises:
        UserError: as `component_folders`.
    """
    return any(_has_weights(folder, name) for name in parts_of_pipeline(folder))


def component_of(name: str, components: Iterable[str]) -> str:
    """What stands before a tensor's name in its component: `unet/`, or nothing for the folder's own."""
    before, slash, _ = name.partition("/")
    return before + slash if slash and before in components else ""


def by_component(names: Iterable[str], components: Iterable[str]) -> dict[str, list[str]]:
    """Names of tensors by what stands before them in their component; in the order in which they come."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(component_of(name, components), []).append(name)
    return found


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
    pickles = sorted(file for file in files if file.endswith(PICKLE_SUFFIXES))
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{folder}: '{name}/{pickles[0]}' is a pickle, which can run code when it is opened; save the model again "
            "as safetensors"
        )
    return holds_safetensors(files, f"{folder}: '{name}/'")


def holds_safetensors(files: Iterable[str], shown: str) -> bool:
    """Whether the files of a component hold weights that can be read.

    Raises:
        UserError: there are weights for other programs alone; it calls the folder `shown`.
    """
    files = sorted(files)
    if any(file.endswith(".safetensors") for file in files):
        return True
    if other := next((file for file in files if file.endswith(_OF_OTHERS)), None):
        raise UserError(f"{shown} holds '{other}' and no safetensors; take a version saved as safetensors")
    return False
