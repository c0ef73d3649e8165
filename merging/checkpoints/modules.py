"""Modules of sentence-transformers: what is done with a transformer's output, in sub-folders beside its weights.

`modules.json` lists them, each with its class and its folder; the transformer itself has the folder "". A folder holds
config.json, and model.safetensors where the module has weights. https://sbert.net
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple

from mergeline.merging.checkpoints.companions import CONFIG, PICKLE_SUFFIXES, WEIGHTS
from mergeline.merging.errors import UserError
from mergeline.merging.files import read_object
from mergeline.merging.reading import read_json, safe_name

MODULES = "modules.json"
MODULE_FILES = (CONFIG, WEIGHTS)
TRANSFORMER = "Transformer"
# The classes whose files are `MODULE_FILES`, and of which none runs code that a checkpoint names.
KINDS = (TRANSFORMER, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")

_PACKAGE = "sentence_transformers."


class Module(NamedTuple):
    """kind: its class, as the file has it. folder: where its files lie, a plain name; "" is the checkpoint's own."""

    kind: str
    folder: str

    @property
    def is_known(self) -> bool:
        """Whether it is one of `KINDS`."""
        return self.kind.startswith(_PACKAGE) and self.kind.rpartition(".")[2] in KINDS


def read_modules(folder: Path) -> list[Module]:
    """The modules of a checkpoint folder in their order; none where it is not of sentence-transformers.

    Raises:
        UserError: as `parsed_modules`.
    """
    file = safe_name(folder, MODULES, folder)
    return parsed_modules(file, str(file)) if file.is_file() else []


def parsed_modules(file: Path, shown: str) -> list[Module]:
    """What a modules.json lists; errors call it `shown`.

    Raises:
        UserError: it is no such list, or names a folder that is not directly inside its own.
    """
    try:
        modules = [_module(entry) for entry in read_json(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{shown}: is no list of modules ({type(error).__name__}: {error}); save the model again"
        ) from None
    for module in modules:
        if module.folder:
            safe_name(file.parent, module.folder, shown)
    return modules


def _module(entry: Any) -> Module:
    kind, folder = entry["type"], entry["path"]
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise TypeError("type and path must be texts")
    return Module(kind, folder)


def module_files(folder: Path) -> dict[str, Path]:
    """The files of the known modules in sub-folders: "1_Pooling/config.json" and such -> where it lies.

    Raises:
        UserError: as `read_modules`; a link leads out of the folder, or weights are there as a pickle alone.
    """
    found = {}
    for module in read_modules(folder):
        place = folder / module.folder
        if not module.folder or not module.is_known or not place.is_dir():
            continue
        refuse_pickled([path.name for path in place.iterdir()], module, str(folder))
        for name in MODULE_FILES:
            if (place / name).is_file():
                found[f"{module.folder}/{name}"] = safe_name(place, name, folder)
    return found


def refuse_pickled(names: list[str], module: Module, source: str) -> None:
    """Raises UserError where the files of a module hold its weights as a pickle alone."""
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles and WEIGHTS not in names:
        raise UserError(
            f"{source}: '{module.folder}/{pickles[0]}' is a pickle, which can run code when it is opened; save the "
            "model again with sentence-transformers 2.3 or newer"
        )


def module_notes(donor: Path, others: Mapping[str, Path]) -> Iterator[str]:
    """A sentence on each module that is not carried, and on each checkpoint whose modules do otherwise than these."""
    modules = read_modules(donor)
    for module in modules:
        if not module.is_known:
            yield f"{MODULES}: the files of '{module.kind}' in '{module.folder}' are not carried"
    own = _settings(donor)
    for name, folder in others.items():
        if not read_modules(folder):
            continue
        if not modules:
            yield (
                f"'{name}' is of sentence-transformers, {donor.name}, whose configuration is carried, is not: name a "
                "donor that is"
            )
        elif differing := sorted(f for f, told in _settings(folder).items() if own.get(f) != told):
            yield f"'{name}' has another {differing[0]} than {donor.name}, whose own is carried"


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations of modules."""
    return {name: read_object(path) for name, path in module_files(folder).items() if path.name == CONFIG}
