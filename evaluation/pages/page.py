"""What HTML pages are made of: one file that loads nothing, tables coloured by their values, axes of line charts.

The templates lie beside this file; they share page.html.jinja, page.css.jinja and page.js, the only script that the
pages' policy lets run.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from mergeline.evaluation.pages.figures import as_text
from mergeline.merging.files import write_bytes

if TYPE_CHECKING:
    from markupsafe import Markup

_GENERATOR = b'<meta name="generator" content="mergeline">'  # as the templates have it
_HEAD = 1 << 12  # bytes of a page, among which it stands
WIDTH, HEIGHT = 400, 220  # of a line chart, in its own coordinates


def write_page(path: Path, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> None:
    """Render a template of this folder to `path`; what it interpolates is escaped, and must all be there.

    Raises:
        UserError: the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, **filters}
    environment.globals |= {"script": Markup(script), "policy": _policy(script)}
    page = environment.get_template(template).render(**values)
    write_bytes(path, (page.strip() + "\n").encode())


def _policy(script: str) -> str:
    """A Content-Security-Policy under which nothing is loaded, pictures are in the page, and this script alone runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def breakable(text: str) -> Markup:
    """A name, escaped, that may be broken after its separators: `task_` `arithmetic`."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(map(escape, re.split(r"(?<=[_/.:@-])(?=\w)", text)))


def is_page(path: Path) -> bool:
    """Whether a file is a page that Mergeline wrote."""
    with open(path, "rb") as file:
        return _GENERATOR in file.read(_HEAD)


def counted(count: int, thing: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


# ------------------------------------------------------------ sections of a modality


class Grid(NamedTuple):
    """A table of texts. columns: the first is of the rows' names. rows: name -> cells, each (text, smaller text below).

    summary: what it is folded away beneath; "" shows it at once.
    """

    label: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]
    summary: str = ""


class Section(NamedTuple):
    """A section of the report that one modality has: its id in the page, heading, what it says, and its tables."""

    id: str
    title: str
    text: str
    grids: list[Grid]


# ------------------------------------------------------------ coloured tables


class Cell(NamedTuple):
    """`heat` is the strength of its colour, 0 to 100; None leaves it blank."""

    text: str
    heat: float | None
    title: str = ""
    best: bool = False


class Table(NamedTuple):
    """A table whose cells are coloured by their values, from the smallest to the largest.

    foot: rows that stay below, however the others are sorted.
    """

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    smallest: float
    largest: float
    foot: Sequence[tuple[str, list[Cell]]] = ()


def table(columns: list[str], rows: list[tuple[str, list[float | None]]], form: str = ".3f") -> Table:
    """Cells with their numbers in this form; a None is a dash."""
    known = [value for _, values in rows for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def cell(value: float | None) -> Cell:
        if value is None:
            return Cell("–", None)
        return Cell(format(value, form).replace("-", "−"), 100 * (value - low) / ((high - low) or 1))

    return Table(columns, [(name, [cell(value) for value in values]) for name, values in rows], low, high)


def square(names: list[str], values: Sequence[Sequence[float | None]]) -> Table | None:
    """A matrix between experts, without its diagonal; None for one expert."""
    if len(names) < 2:
        return None
    rows = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)]
    return table(names, list(zip(names, rows)))


# ------------------------------------------------------------ line charts


class Axis(NamedTuple):
    """Maps values to picture coordinates; ticks are (coordinate, label)."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / ((high - low) or 1), 1)

    def ticks(
        self, values: Iterable[float], room: float, form: Callable[[float], str] = as_text
    ) -> list[tuple[float, str]]:
        """Those of `values` whose labels keep a distance of `room`."""
        kept: list[tuple[float, str]] = []
        for value in values:
            if not kept or abs(self.at(value) - kept[-1][0]) >= room:
                kept.append((self.at(value), form(value)))
        return kept


def round_values(values: Sequence[float], least: float = 0.0) -> list[float]:
    """At most eight round values around all of `values`, `least` or more apart."""
    low, high = min(values), max(values)
    step = 10.0 ** math.floor(math.log10(max(high - low, least, 1e-12) / 6))
    step = max(next(s * step for s in (1, 2, 5, 10) if high - low <= 6 * s * step * (1 + 1e-9)), least)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
