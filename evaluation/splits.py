"""Splits of a source of examples: its own ones by name, or drawn at random where it lacks some.

Where no validation split is given, a tenth of train is held out. The draw is one permutation with a fixed seed of the
examples in a fixed order, so it is the same everywhere.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterator, Mapping, Sequence
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from mergeline.merging.errors import UserError, did_you_mean

SPLITS = ("val", "test")
FIT = "fit"  # what statistics are collected from and merges are fitted to
FITTED_OF_VAL, CHOOSING_OF_VAL = slice(0, None, 2), slice(1, None, 2)  # where there is no `fit`
DRAWN_SHARE = 0.1
DRAW_SEED = 0


def choosing(fits_val: bool) -> slice:
    """The examples of `val` that choose: all of them, unless others stand for a split `fit`."""
    return CHOOSING_OF_VAL if fits_val else slice(None)


@dataclass(frozen=True)
class Examples:
    """`get(i)` is the i-th of `size` examples: a pair of an image (PIL or uint8 array) and its label, if they are
    labelled, or a row of a table."""

    size: int
    get: Callable[[int], Any]
    classnames: list[str] | None = None
    labelled: bool = True

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        return replace(self, size=len(indices), get=lambda i: self.get(int(indices[i])))

    def draw(self, parts: int, more: int = 0) -> list[Examples]:
        """`parts` disjoint random samples of a tenth each, and a last one of `more` others."""
        order = np.random.default_rng(DRAW_SEED).permutation(self.size)
        size = round(DRAWN_SHARE * self.size)
        drawn = [self.take(np.sort(order[k * size : (k + 1) * size])) for k in range(parts)]
        return [*drawn, self.take(np.sort(order[parts * size : parts * size + more]))]


@dataclass(frozen=True)
class Opened:
    """The examples of the splits, and which of the splits were drawn at random."""

    val: Examples
    test: Examples
    drawn: tuple[str, ...] = ()
    fit: Examples | None = None


def official(split: Callable[[str], Examples], options: Mapping[str, str], source: str) -> Opened:
    """The source's own splits, by the names in `options`; without `val` there, it is drawn from train.

    `fit` names a split, or says how many of train are drawn beside val.
    """
    test_name, fit = options.get("test", "test"), options.get(FIT, "")
    if fit.isdecimal() and not int(fit):
        raise UserError(f"{source}: fit={fit} is no example; write how many, or leave fit out")
    if fit and fit == options.get("val", ""):
        raise UserError(
            f"{source}: fit={fit} is val, which chooses; leave fit out, and half of val is fitted to"
        )
    if fit and fit == test_name:
        raise UserError(f"{source}: fit={fit} is test, which reports alone; name another split")
    if fit and not fit.isdecimal() and "val" not in options:
        raise UserError(
            f"{source}: val is drawn from train; write fit=400 for so many others, or name val=, too"
        )
    test = split(test_name)
    if "val" in options:
        drawn: tuple[str, ...] = (FIT,) if fit.isdecimal() else ()
        own = (
            beside(split(options.get("train", "train")), 0, fit, source)[-1] if drawn else fit and split(fit)
        )
        return Opened(split(options["val"]), test, drawn, own or None)
    val, own = beside(split(options.get("train", "train")), 1, fit, source)
    return Opened(val, test, ("val", *([FIT] if own else [])), own)


def beside(examples: Examples, parts: int, fit: str, source: str) -> list[Any]:
    """`parts` samples of a tenth each, and those of `fit`, or None."""
    count = int(fit or 0)
    *drawn, own = examples.draw(parts, count)
    if own.size < count:
        raise UserError(
            f"{source}: fit={fit}, but train has {own.size} that are not in val; write a smaller number"
        )
    return [*drawn, own if count else None]


@contextmanager
def blame(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library says about bad input into a UserError of one line."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason[:300]}") from None


def parsed(source: str) -> tuple[str, dict[str, str]]:
    """What stands between :// and ?, and the options after it."""
    parts = urlsplit(source)
    with blame(source, ValueError):
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    return parts.netloc + parts.path, options


def check_options(source: str, options: Mapping[str, str], known: set[str]) -> None:
    """Raises UserError for an option that is not known."""
    for key in options:
        if key not in known:
            raise UserError(f"{source}: unknown option '{key}'{did_you_mean(key, known)}")
