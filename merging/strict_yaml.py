"""YAML files checked against a pydantic model; a mistake is blamed by file and line, with the nearest known name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from merging.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


class YamlFile:
    """A YAML file that remembers where each value stands."""

    def __init__(self, path: Path):
        """Raises UserError if the file is missing or not YAML."""
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        self.path = path
        try:
            self._data = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (YAMLError, UnicodeDecodeError) as error:
            mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
            reason = error.problem if isinstance(error, MarkedYAMLError) else str(error)
            raise UserError(
                f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {' '.join(reason.split())}"
            ) from None

    @property
    def data(self) -> Any:
        """The content, of the plain types of Python."""
        return _plain(self._data)

    def error(self, loc: Sequence[Any], problem: str) -> UserError:
        """A UserError that names the line where `loc` (keys and indexes) stands."""
        return UserError(f"{self.path}:{self._line(loc)}: {problem}")

    def parse(self, model: type[Model]) -> Model:
        """The content as `model` (raises UserError for an unknown key or a wrong value)."""
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            # A misspelt key is also a missing one; the first says more.
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            loc = [part for part in first["loc"] if part != "[key]"]
            raise self.error(
                loc, f"{'.'.join(map(str, loc)) or 'the file'}: {_explain(first, model, loc)}"
            ) from None

    def _line(self, loc: Sequence[Any]) -> int:
        """The line (from 1) of the deepest part of `loc` that stands in the file."""
        line, data = 1, self._data
        for part in loc:
            if not isinstance(data, (dict, list)) or isinstance(data, dict) and part not in data:
                break
            line = (data.lc.key(part) if isinstance(data, dict) else data.lc.item(part))[0] + 1
            data = data[part]
        return line


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    return value


def _explain(error: Any, model: type[BaseModel], loc: list[Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + did_you_mean(loc[-1], _keys_at(model, loc[:-1]))
    return error["msg"].removeprefix("Value error, ")


def _keys_at(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """The keys that are known below `loc`; a part of it that is no field is the key of a dict of models."""
    for part in loc:
        if part in model.model_fields:
            model = next((m for m in _models(model.model_fields[part].annotation)), model)
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
