"""YAML files checked against a pydantic model; a mistake is blamed by file and line, with the nearest known name."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, NoReturn, Sequence, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from mergeline.merging.errors import UserError, did_you_mean, plainly
from mergeline.merging.reading import DEEPEST, open_regular

if TYPE_CHECKING:
    from ruamel.yaml import YAML

Model = TypeVar("Model", bound=BaseModel)

# More than any file that a person writes, and little enough to be read in about two seconds.
_MOST_BYTES = 1 << 20
_MOST_VALUES = (
    20_000  # aliases count as what they stand for; 500 checkpoints and 200 grids of 50 values are 14,000
)
_MOST_ALIASES = 200
_MOST_DOCUMENTS = 100
_TOO_DEEP = f"nested deeper than {DEEPEST} lists and mappings; write it flatter"
_TAG = re.compile(r"\[\w+\]")  # in places: pydantic's "[key]", and ours of one of several forms
_BRACKETS = re.compile(r"(?:[\[{]\s*){%d}" % (DEEPEST + 1))  # the scanner would take a second for them


class YamlFile:
    """A YAML file, or a document of one, that remembers where each value stands."""

    def __init__(self, path: Path, content: Any = None):
        """content: of a document that was read. Raises UserError as `documents`, and for a file of several."""
        self.path, self._data = path, content
        if content is None:
            found = documents(path)
            if len(found) > 1:
                raise UserError(
                    f"{path}:{found[1].first_line}: not valid YAML: but found another document; `mergeline merge` and "
                    "`plan` alone take several, which are mergekit's"
                )
            self._data = found[0]._data if found else None

    @cached_property
    def data(self) -> Any:
        """The content, of the plain types of Python."""
        return _plain(self._data)

    @property
    def first_line(self) -> int:
        """Where it begins, from 1."""
        return 1 + int(getattr(getattr(self._data, "lc", None), "line", 0))

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
            loc = [part for part in first["loc"] if not _TAG.fullmatch(str(part))]
            if not loc:
                wrong = "is empty" if self.data is None else _explain(first, model, loc)
                raise self.error(loc, f"the file {wrong}") from None
            raise self.error(loc, f"{'.'.join(map(str, loc))}: {_explain(first, model, loc)}") from None

    def _line(self, loc: Sequence[Any]) -> int:
        """The line (from 1) of the deepest part of `loc` that stands in the file."""
        line, data = self.first_line, self._data
        for part in loc:
            known = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
            if part not in known:
                break
            # Nothing is known of keys that `<<` brings, and of lists with a tag.
            places = data.lc.data or {}
            line = places[part][0] + 1 if part in places else line
            data = data[part]
        return line


def documents(path: Path) -> list[YamlFile]:
    """The documents of a file (raises UserError if it is missing, not YAML, or larger or deeper than people write)."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"{path}: holds more than {_MOST_BYTES} bytes; is it the right file?")
        text = content.decode()
        if deep := _BRACKETS.search(text):
            line = text.count("\n", 0, deep.start()) + 1
            raise UserError(f"{path}:{line}: not valid YAML: {_TOO_DEEP}")
        found = list(islice(_reader().load_all(text), _MOST_DOCUMENTS + 1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        reason = error.problem if isinstance(error, MarkedYAMLError) else str(error)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {' '.join(reason.split())}"
        ) from None
    if len(found) > _MOST_DOCUMENTS:
        raise UserError(f"{path}: holds more than {_MOST_DOCUMENTS} documents; is it the right file?")
    return [YamlFile(path, data) for data in found if data is not None]


def _reader() -> YAML:
    """Reads YAML with the lines of everything, and refuses what would take for ever, or more memory than there is."""
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer, ComposerError
    from ruamel.yaml.events import AliasEvent
    from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
    from ruamel.yaml.parser import Parser
    from ruamel.yaml.scanner import Scanner

    class Bounded(Composer):
        """Counts values while they are composed: a file of some lines may stand for billions of them."""

        def __init__(self, loader: Any = None):
            super().__init__(loader)
            self.aliases = 0
            self.values: dict[int, int] = {}  # in a node and below it, by the node's id

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.parser.peek_event().start_mark
            if parent is None:  # of another document, whose nodes may have the ids of earlier ones
                self.values.clear()
                self.aliases = 0
            if self.depth >= DEEPEST:
                refuse(_TOO_DEEP, mark)
            if self.parser.check_event(AliasEvent):
                self.aliases += 1
                if self.aliases > _MOST_ALIASES:
                    refuse(f"more than {_MOST_ALIASES} aliases; write it out", mark)
            if len(self.values) > _MOST_VALUES:
                refuse(f"more than {_MOST_VALUES} values; is it the right file?", mark)
            node = super().compose_node(parent, index)
            if id(node) not in self.values:
                if node.end_mark is None:
                    refuse("an anchor holds an alias of itself", mark)
                self.values[id(node)] = 1 + sum(self.values[id(below)] for below in _below(node, Node))
            if index is None and isinstance(parent, MappingNode) and not isinstance(node, ScalarNode):
                refuse("a key is a list or a mapping; write text", mark)
            if self.values[id(node)] > _MOST_VALUES:
                refuse(f"its aliases stand for more than {_MOST_VALUES} values; write less", mark)
            return node

    def refuse(problem: str, mark: Any) -> NoReturn:
        raise ComposerError(None, None, problem, mark)

    reader = YAML(typ="rt")
    reader.Composer = Bounded
    reader.Scanner, reader.Parser = (
        Scanner,
        Parser,
    )  # those of "rt" also keep comments, for half as much time again
    return reader


def _below(node: Any, kind: type) -> Iterator[Any]:
    """The nodes in a node of YAML."""
    for value in node.value if isinstance(node.value, list) else ():
        yield from (value,) if isinstance(value, kind) else value


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
    return plainly(error)


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
