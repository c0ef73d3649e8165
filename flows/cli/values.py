"""What is written after an option: sizes, ages, ranks, KEY=VALUE, NAME=PATH and grids."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Iterable

from mergeline.merging.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datetime import timedelta

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def size(text: str) -> int:
    """Bytes of `500MB` or `2GiB`.

    Raises:
        argparse.ArgumentTypeError: it is no such size.
    """
    number = text.rstrip("BKMGIbkmgi ")
    unit = text[len(number) :].strip().upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 500MB or 2GiB") from None


def age(text: str) -> timedelta:
    """A time span, of `90m`, `12h` or `30d`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    from datetime import timedelta

    found = re.fullmatch(r"(\d{1,6})([mhd])", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no age; write 90m, 12h or 30d")
    return (
        int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]
    )


def count(text: str) -> int:
    """A whole number from 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of things; write 10")
    return int(text)


def rank(text: str) -> int | float | str:
    """A number of directions (a whole number), or a share of them; `cat`, all that adapters have.

    Raises:
        argparse.ArgumentTypeError: it is no number.
    """
    found = _json_or_text(text)
    if type(found) not in (int, float) and text != "cat":
        raise argparse.ArgumentTypeError(f"'{text}' is no rank; write 16, a share such as 0.04, or cat")
    return found


def executor(text: str) -> str:
    """The name of an executor.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    from mergeline.tasks.executors import place_of

    try:
        return place_of(text).text
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        argparse.ArgumentTypeError: one of them is no number.
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are no numbers; write 0.04,0.08") from None


def pair(option: str, text: str, form: str) -> tuple[str, str]:
    """What stands before and after the first equals sign of what `option` was given.

    Raises:
        UserError: there is none; `form` says what to write.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text}: write {form}")
    return key, value


def amounts(option: str, texts: Iterable[str], form: str) -> dict[str, float]:
    """Finite numbers by name, of NAME=NUMBER as `form` has it.

    Raises:
        UserError: a text is no such pair, or two have one name.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, value = pair(option, text, form)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{option} {text}: '{value}' is no number; write {form}")
        if name in found:
            raise UserError(f"{option} {text}: '{name}' is given twice; keep one")
        found[name] = number
    return found


def experts(texts: Iterable[str]) -> dict[str, str]:
    """Where each expert lies, by name: of NAME=PATH, or of PATH, whose file name it then takes.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, named, where = text.partition("=")
        if not named:
            name, where = Path(text).stem, text
        if name in found:
            raise UserError(f"two experts are named '{name}'; name them apart: --expert NAME=PATH")
        found[name] = where
    return found


def settings(texts: Iterable[str], experts: Collection[str] = ()) -> dict[str, Any]:
    """Parameters of KEY=VALUE; a value is JSON, a list of it between commas, or else the text itself.

    KEY.NAME=VALUE is the entry of an expert in a list of one an expert.

    Raises:
        UserError: a text has no equals sign, an expert is not known, or one of them has no entry.
    """
    found: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, value = pair("--set", text, "KEY=VALUE")
        key, dot, name = key.partition(".")
        if dot:
            entries.setdefault(key, {})[name] = _json_or_text(value)
        else:
            found[key] = _json_list_or_text(value)
    for key, named in entries.items():
        if key in found:
            raise UserError(f"--set {key}: give a list, or {key}.NAME for every expert")
        for name in named:
            if name not in experts:
                raise UserError(f"--set {key}.{name}: no expert is named so{did_you_mean(name, experts)}")
        if missing := [name for name in experts if name not in named]:
            raise UserError(f"--set {key}: give {key}.{missing[0]} too; every expert needs one")
        found[key] = [named[name] for name in experts]
    return found


def grid(texts: Iterable[str], fixed: Collection[str]) -> dict[str, list[Any]]:
    """Values by parameter, of KEY=V1,V2,... or KEY=[V1, V2]; `fixed` are parameters that have a value already.

    Raises:
        UserError: a text has no equals sign, a parameter is given twice or is fixed.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, values = pair("--grid", text, "KEY=V1,V2,...")
        if key in found or key in fixed:
            raise UserError(f"'{key}' is given twice; list all its values in one --grid")
        listed = _json_or_text(values)
        if isinstance(listed, list):
            found[key] = listed
        else:
            found[key] = [_json_or_text(value) for value in values.split(",")] if values else []
    return found


def _json_list_or_text(text: str) -> Any:
    """A JSON value, or a list of those between commas; else the text."""
    listed = _json_or_text(f"[{text}]")
    if not listed or not isinstance(listed, list):
        return text
    return listed[0] if len(listed) == 1 else listed


def _json_or_text(text: str) -> Any:
    from mergeline.merging.reading import TooDeep, parsed_json

    try:
        return parsed_json(text)
    except TooDeep as error:
        raise UserError(f"{text[:20]}...: {error}; write it flatter") from None
    except ValueError:
        return text
