"""What `mergeline inspect` prints of a family: aligned tables."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Sequence

from mergeline.evaluation.pages.family import advised_rules, passed_on
from mergeline.evaluation.pages.page import counted
from mergeline.merging.errors import printable

Json = dict[str, Any]


def lines(found: Json) -> Iterator[str]:
    """The tables of what `merging.describe.describe_family` found."""
    names = list(found["experts"])
    of = f"{counted(found['tensors'], 'tensor')}, of which {found['matrices']} are matrices of blocks"
    yield f"{found['base']} and {counted(len(names), 'expert')}: {of}"
    for lock in found["locks"].values():
        yield f"locked: {lock['sentence']}; so it is in {lock['modules']} of {lock['of']} attention modules"
    for note in found["notes"]:
        yield f"note: {note}"
    yield from _advice(found)
    yield from _experts(found)
    if found["origins"]:
        yield from _ranks(found)
    if len(names) > 1:
        yield from _pairs(found, names)
    yield from _layers(found)
    yield from _diagnoses(found, names)


def _advice(found: Json) -> Iterator[str]:
    yield from ("", "What to do")
    advice = found["diagnoses"]["advice"]
    if not advice:
        yield "  nothing: no expert is out of line"
    for one in advice:
        yield f"  {printable(one['sentence'])}"
    if rules := advised_rules(found):
        yield "  as lines of a recipe:"
        yield from (f"    {line}" for line in rules.splitlines())


def _experts(found: Json) -> Iterator[str]:
    keys = {
        "norm": ("norm", ".2f"),
        "/ base": ("relative_norm", ".4f"),
        "cosine with base": ("alignment_with_base", ".4f"),
        "stable rank": ("stable_rank", ".1f"),
        "effective rank": ("effective_rank", ".1f"),
        "of full": ("effective_rank_share", ".0%"),
    }
    rows = [
        (name, [_text(own[key], form) for key, form in keys.values()])
        for name, own in found["experts"].items()
    ]
    yield from _table("Task vectors, expert - base", list(keys), rows)


def _ranks(found: Json) -> Iterator[str]:
    columns = [f"{rank:g}" for rank in found["ranks"]]
    rows = []
    for origin, own in found["origins"].items():
        rows.append((f"R(k), {origin}", [_text(value) for value in own["error_share"]]))
        rows.append((f"I(k), {origin}", [_text(value) for value in own["interference"]]))
    title = "By rank: error R(k), as a share of R(0), and interference I(k), around the base and the mean"
    yield from _table(title, columns, rows)
    energies = found["origins"]["base"]["energy"]
    rows = [(name, [_text(e, ".1%") for e in own]) for name, own in zip(found["experts"], energies)]
    yield from _table("Energy by rank, around the base", columns, rows)


def _pairs(found: Json, names: Sequence[str]) -> Iterator[str]:
    yield from _triangles("Cosine of task vectors", names, found["cosine"], None)
    yield from _triangles(
        "Sign conflict: share of entries (below), by magnitude (above); "
        f"{found['cancelled']:.0%} of all magnitude cancels in the sum",
        names,
        found["sign_conflict"],
        found["sign_conflict_by_magnitude"],
    )
    if overlap := found["overlap"]:
        yield from _triangles(
            f"Overlap of subspaces of rank {found['typical_rank']:g}: of inputs (below, by chance "
            f"{overlap['inputs_by_chance']:.3f}), of outputs (above, {overlap['outputs_by_chance']:.3f})",
            names,
            overlap["inputs"],
            overlap["outputs"],
        )


def _triangles(
    title: str, names: Sequence[str], below: list[list], above: list[list] | None
) -> Iterator[str]:
    def cell(i: int, j: int) -> str:
        if i == j:
            return ""
        return _text(below[i][j]) if i > j else _text(above[i][j]) if above else ""

    places = range(len(names))
    yield from _table(title, names, [(names[i], [cell(i, j) for j in places]) for i in places])


def _layers(found: Json) -> Iterator[str]:
    keys: dict[str, str | None] = {"norm / base, mean": None}
    if len(found["experts"]) > 1:
        keys |= {
            "cosine": "cosine",
            "conflict": "sign_conflict",
            "by magnitude": "sign_conflict_by_magnitude",
        }
        keys |= {"cancelled": "cancelled"}
    if found["origins"]:
        keys |= {"effective rank": "effective_rank_share"}
    for origin in found["origins"]:
        keys |= {f"R, {origin}": f"error_share_{origin}", f"I, {origin}": f"interference_{origin}"}
    rows = []
    for layer in found["layers"]:
        norms = layer["relative_norm"]
        values = [sum(norms) / len(norms) if key is None else layer[key] for key in keys.values()]
        rows.append((layer["layer"], [_text(value) for value in values]))
    at = f" (R and I at rank {found['typical_rank']:g})" if found["origins"] else ""
    yield from _table(f"By layer{at}", list(keys), rows)


def _diagnoses(found: Json, names: Sequence[str]) -> Iterator[str]:
    layers = [layer["layer"] for layer in found["layers"]]

    def table(title: str, values: Sequence[Sequence[float | None] | None], form: str) -> Iterator[str]:
        empty = [None] * len(names)
        cells = [[_text(value, form) for value in own or empty] for own in values]
        return _table(title, names, list(zip(layers, cells)))

    diagnoses = found["diagnoses"]
    if len(names) > 1:
        yield from _triangles(
            "Kinship: median of the cosine over blocks (below), Pearson's correlation (above)",
            names,
            diagnoses["kinship"]["median_cosine"],
            diagnoses["kinship"]["pearson"],
        )
        undone = diagnoses["interference"]["undone"]
        yield from table("Undone by the other experts (negative: strengthened)", undone, ".1%")
    scopes = diagnoses["scopes"]
    for tower, own in diagnoses["composition"].items():
        yield from _composition(tower, own)
    if any(scopes["ratio"]):
        yield from table(
            "Scope: standard deviation of weights, relative to the base's", scopes["ratio"], ".4f"
        )
        yield from table("Share of the change that is one of scope", scopes["share"], ".1%")


def _composition(tower: str, found: Json) -> Iterator[str]:
    keys = {"mean": "mean", "largest": "largest", "in base": "in_base", "in expert": "in_expert"}
    keys |= {"in average": "in_average"}
    rows = [
        (name, [*(_text(own[key], ".4f") for key in keys.values()), passed_on(own)])
        for name, own in found["experts"].items()
    ]
    by_chance = f"by chance {found['by_chance']:.3f}"
    title = f"Composition of heads in {tower} ({by_chance}): how far the average is from an expert"
    yield from _table(title, [*keys, "of"], rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """A blank line, the title, and columns aligned to the right of the first."""
    table = [["", *map(printable, columns)], *([printable(name), *cells] for name, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    yield from ("", title)
    for first, *cells in table:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:]))
        yield "  ".join(("", first.ljust(widths[0]), *aligned)).rstrip()


def _text(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
