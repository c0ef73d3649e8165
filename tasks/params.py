"""params.yaml: the only parameters of a pipeline, read, checked, and blamed by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

from mergeline.evaluation.measures import Measures
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.methods import load_methods
from mergeline.merging.strict_yaml import YamlFile
from mergeline.tasks.gates import misplaced
from mergeline.tasks.modalities import modalities, modality_of
from mergeline.tasks.schema import Merge, Params, Problem

__all__ = ["Merge", "Params", "checked_params", "load_params", "lookup", "raw_params"]


def load_params(path: Path) -> Params:
    """Read and check a params.yaml (raises UserError as `checked_params`)."""
    return checked_params(YamlFile(path))


def checked_params(file: YamlFile) -> Params:
    """What a params.yaml says.

    Raises:
        UserError: `file:line: what is wrong`, with the nearest known name for a typo.
    """
    params = file.parse(_schema(file))
    for i, defined in enumerate(params.methods):
        try:
            load_methods(file.path.parent / defined)
        except UserError as error:
            raise file.error(["methods", i], str(error)) from None
    for loc, problem in params.problems():
        raise file.error(loc, problem)
    for loc, problem in _searches(params):
        raise file.error(loc, problem)
    for gate, problem in misplaced(params.gates, Measures(modality_of(params).measures(params))):
        raise file.error(["gates", gate], problem)
    return params


def raw_params(path: Path) -> dict[str, Any]:
    """params.yaml as plain data, the way DVC records it."""
    return YamlFile(path).data


def lookup(data: dict[str, Any], key: str) -> Any:
    """The value under a dotted key such as `merges.cart`."""
    value: Any = data
    for part in key.split("."):
        value = value[part]
    return value


def _searches(params: Params) -> Iterator[Problem]:
    """What is wrong with searches for models of this kind."""
    modality = modality_of(params)
    for section in ("merges", "merges_of_merges"):
        for name, merge in getattr(params, section).items():
            if merge.within and merge.within.race and not modality.in_parts(params):
                wrong = f"{modality.models} are not measured on some of the examples alone; leave race out"
                yield [section, name, "search", "race"], wrong


def _schema(file: YamlFile) -> type[Params]:
    """What the file must be: the parameters of the one modality whose sections it has (raises UserError)."""
    if not isinstance(file.data, dict):
        wrong = "is empty" if file.data is None else "must hold keys and values"
        raise file.error([], f"the file {wrong}; `mergeline init` makes one to start from")
    known = modalities().values()
    named = [modality for modality in known if not file.data.keys().isdisjoint(modality.sections)]
    if len(named) == 1:
        return named[0].schema()
    keys = [*Params.model_fields, *(section for modality in known for section in modality.sections)]
    for key in file.data:
        if key not in keys:
            raise file.error([key], f"{key}: unknown key{did_you_mean(key, keys)}")
    second = [key for modality in named[1:] for key in modality.sections if key in file.data]
    raise file.error(second[:1], f"measure {', or '.join(modality.models for modality in known)}")
