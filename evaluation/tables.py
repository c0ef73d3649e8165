"""Tables of examples that are texts, read once and kept as JSON lines.

A source is one of
    folder/                             test.jsonl, and val.jsonl or train.jsonl, and fit.jsonl or none; .json (a list
                                        of objects), .csv, .tsv and .parquet, too
    hf-dataset://org/name@revision      also ?config=, test=test, val=train[90%:], train=train, fit=400

Splits are those of evaluation/splits.py. `fit` is what merges are fitted to; without it, that is every other row of
val.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from mergeline.evaluation.splits import (
    FIT,
    FITTED_OF_VAL,
    SPLITS,
    Examples,
    Opened,
    blame,
    check_options,
    official,
    parsed,
)
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import publish, staged, write_bytes, write_json

Row = dict[str, Any]  # column -> value, as JSON has them

_SCHEME = "hf-dataset://"
_META = "meta.json"


@dataclass(frozen=True)
class Table:
    """A prepared table. classnames: column -> the names of its numbers, where the source has some."""

    folder: Path
    classnames: Mapping[str, list[str]]
    drawn: Sequence[str]

    def rows(self, split: str) -> list[Row]:
        """The rows of `fit`, `val` or `test` (raises UserError); where there is no `fit`, every other one of `val`."""
        if split == FIT and self.fits_val:
            return self.rows("val")[FITTED_OF_VAL]
        path = self.folder / f"{split}.jsonl"
        try:
            return _json_lines(path)
        except (OSError, ValueError):
            raise UserError(f"{path}: not a prepared table; prepare it again") from None

    def column(self, split: str, name: str) -> list[Any]:
        """The values of a column of a split (raises UserError where a row has none)."""
        rows = self.rows(split)
        for i, row in enumerate(rows):
            if row.get(name) is None:
                columns = sorted({key for r in rows for key, value in r.items() if value is not None})
                raise UserError(
                    f"{self.folder.name}: row {i} of {split} has no '{name}'{did_you_mean(name, columns)}"
                )
        return [row[name] for row in rows]

    @cached_property
    def fits_val(self) -> bool:
        """Whether it has no split `fit`, so that rows of `val` stand for one."""
        return not (self.folder / f"{FIT}.jsonl").exists()


def load_table(folder: Path | str) -> Table:
    """Open what `prepare_table` made (raises UserError)."""
    try:
        meta = json.loads((Path(folder) / _META).read_text())
        return Table(Path(folder), meta["classnames"], meta["drawn"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not a prepared table (no valid {_META}); prepare it again") from None


def prepare_table(
    source: str,
    out: Path | str,
    beside: Sequence[str] = (),
    change: Callable[[Row, str, Path], Row] = lambda row, where, place: row,
) -> None:
    """Read a table into the folder `out`: val.jsonl, test.jsonl, fit.jsonl if there is one, meta.json.

    beside: names of further tables, without their endings, that a folder must have and that all splits share.
    change: makes of each row what is written, given what errors call it, and the folder, where it may put files.
    The same source gives the same bytes. `out` appears whole or not at all, and replaces what was there.

    Raises:
        UserError: the source is not there, cannot be read, or has an empty split.
    """
    classnames: dict[str, list[str]] = {}
    out, opened = Path(out), _open(source, classnames)
    tables = {split: getattr(opened, split) for split in SPLITS} | ({FIT: opened.fit} if opened.fit else {})
    tables |= {name: _of_file(_folder(source), name) for name in beside}
    with staged(out) as place:
        for name, rows in tables.items():
            if not rows.size:
                raise UserError(f"{source}: the table '{name}' is empty")
            with blame(f"{source}: {name}", TypeError, ValueError):
                made = (change(rows.get(i), f"{source}: row {i} of {name}", place) for i in range(rows.size))
                lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in made]
            write_bytes(place / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
        meta = {
            "source": source
            if "://" in source
            else Path(source).name,  # where it lies is no part of what it is
            "classnames": classnames,
            "sizes": {name: rows.size for name, rows in tables.items()},
            "drawn": list(opened.drawn),
        }
        write_json(place / _META, meta)
        publish(place, out)


def _open(source: str, classnames: dict[str, list[str]]) -> Opened:
    """The splits of a source; the names that it gives to numbers go into `classnames`."""
    if source.startswith(_SCHEME):
        return _open_hub(source, classnames)
    root = _folder(source)
    opened = official(partial(_of_file, root), {"val": "val"} if _file(root, "val") else {}, source)
    return replace(opened, fit=_of_file(root, FIT)) if _file(root, FIT) else opened


def _folder(source: str) -> Path:
    if "://" in source:
        known = (
            "only a folder has all the tables that are needed"
            if source.startswith(_SCHEME)
            else "unknown scheme"
        )
        raise UserError(f"{source}: {known}; name a folder")
    if not Path(source).is_dir():
        raise UserError(
            f"{source}: no such folder; a table is a folder with test.jsonl, and val.jsonl or train.jsonl"
        )
    return Path(source)


def _file(root: Path, name: str) -> Path | None:
    found = [path for ending in _READERS if (path := root / f"{name}{ending}").is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name}: keep one of the two")
    return found[0] if found else None


def _of_file(root: Path, name: str) -> Examples:
    path = _file(root, name)
    if path is None:
        raise UserError(f"{root}: has no {name}.jsonl (nor {', '.join([*_READERS][1:])})")
    with blame(str(path), OSError, ValueError, KeyError, RecursionError, csv.Error):
        rows = _READERS[path.suffix](path)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {i} is no object of columns and values")
    return Examples(len(rows), rows.__getitem__)


def _json_lines(path: Path) -> list[Row]:
    # Not splitlines, which ends a line at characters that may stand in a text, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _json(path: Path) -> list[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError("is no list of objects")
    return rows


def _csv(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    return pyarrow.parquet.read_table(path).to_pylist()


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _open_hub(source: str, classnames: dict[str, list[str]]) -> Opened:
    address, options = parsed(source)
    check_options(source, options, {"config", "train", "val", "test", FIT})
    path, _, revision = address.partition("@")
    with blame(source, ImportError):
        import datasets

    def rows(split: str) -> Examples:
        with blame(source, datasets.exceptions.DatasetsError, OSError, ValueError, ImportError):
            table = datasets.load_dataset(path, options.get("config"), split=split, revision=revision or None)
        named = {name: f.names for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        classnames.update(named)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        return Examples(len(table), table.__getitem__)

    return official(rows, options, source)
