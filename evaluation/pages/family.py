"""The page of a family of experts: what `mergeline inspect` found in their task vectors, as tables and curves.

This module turns results into what the page shows; family.html.jinja says how it looks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from mergeline.evaluation.pages.charts import Chart, line_chart
from mergeline.evaluation.pages.figures import as_text
from mergeline.evaluation.pages.page import (
    Table,
    counted,
    square,
    table,
    write_page,
)

Json = dict[str, Any]

_ORIGINS = {"base": "around the base", "mean": "around the mean"}


def render_family(path: Path, found: Json) -> None:
    """Write the page to `path`, the same bytes for the same results.

    found: what `merging.describe.describe_family` returns.

    Raises:
        UserError: the file cannot be written.
    """
    filters: dict[str, Callable[..., Any]] = {
        "counted": counted,
        "value": as_text,
        "text": _text,
        "passed_on": passed_on,
    }
    names = list(found["experts"])
    overlap = found["overlap"] or {}
    write_page(
        path,
        "family.html.jinja",
        filters,
        found=found,
        longest=max(expert["relative_norm"] for expert in found["experts"].values()) or 1,
        rank_charts=_rank_charts(found),
        energy_charts=_energy_charts(found),
        by_rank=_by_rank(found),
        energies={_ORIGINS[o]: _energies(found, o) for o in found["origins"]},
        pairs={
            key: square(names, values)
            for key, values in (
                ("cosine", found["cosine"]),
                ("sign_conflict", found["sign_conflict"]),
                ("sign_conflict_by_magnitude", found["sign_conflict_by_magnitude"]),
                ("inputs", overlap.get("inputs", [])),
                ("outputs", overlap.get("outputs", [])),
            )
            if len(values) > 1
        },
        layer_charts=_layer_charts(found),
        kinship={
            key: square(names, found["diagnoses"]["kinship"][key])
            for key in ("median_cosine", "pearson", "distance")
            if len(names) > 1
        },
        by_layer=_by_layer(found, names),
        rules=advised_rules(found),
    )


def advised_rules(found: Json) -> str:
    """The rules that are advised, as lines of a recipe; "" if there are none."""
    rules = [rule for advice in found["diagnoses"]["advice"] for rule in advice["rules"]]
    if not rules:
        return ""
    weights = ", ".join("1" * len(found["experts"]))
    lines = [f"  - {json.dumps(rule, ensure_ascii=False)}" for rule in rules]
    return "\n".join([f"params: {{weights: [{weights}]}}", "rules:", *lines])


def passed_on(drift: Json) -> str:
    """Which two heads the largest drift is of, by layer and number: `2.1 -> 3.0 (key)`."""
    writer, reader = (".".join(map(str, drift[key])) for key in ("writer", "reader"))
    return f"{writer} -> {reader} ({drift['kind']})"


def _text(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


# ------------------------------------------------------------ charts


def _rank_charts(found: Json) -> list[Chart]:
    across = "rank, as a share of full rank"

    def chart(title: str, key: str) -> Chart | None:
        lines = {_ORIGINS[name]: origin[key] for name, origin in found["origins"].items()}
        return line_chart(title, across, found["ranks"], lines)

    charts = [
        chart("Reconstruction error R(k), share of R(0)", "error_share"),
        chart("Interference I(k), mean over pairs and matrices", "interference"),
    ]
    return [c for c in charts if c]


def _energy_charts(found: Json) -> list[Chart]:
    names = list(found["experts"])
    charts = [
        line_chart(
            f"Energy in leading directions, {_ORIGINS[name]}",
            "rank, as a share of full rank",
            found["ranks"],
            dict(zip(names, origin["energy"])),
        )
        for name, origin in found["origins"].items()
    ]
    return [c for c in charts if c]


def _layer_charts(found: Json) -> list[Chart]:
    """Over the blocks of each tower that the experts changed."""
    towers: dict[str, list[Json]] = {}
    for layer in found["layers"]:
        if layer["block"] is not None and any(layer["norm"]):
            towers.setdefault(layer["tower"], []).append(layer)
    charts = []
    for tower, layers in towers.items():
        across = f"block of {tower}" if tower else "block"
        norms = zip(*(layer["relative_norm"] for layer in layers))
        around = {
            f"{what} {_ORIGINS[o]}": [layer[f"{key}_{o}"] for layer in layers]
            for key, what in (("error_share", "R"), ("interference", "I"))
            for o in found["origins"]
        }
        pairs = {
            "cosine": [layer["cosine"] for layer in layers],
            "sign conflict by magnitude": [layer["sign_conflict_by_magnitude"] for layer in layers],
            "cancelled in the sum": [layer["cancelled"] for layer in layers],
        }
        spread = {"effective rank": [layer["effective_rank_share"] for layer in layers]}
        rank = as_text(found["typical_rank"])
        blocks = [layer["block"] for layer in layers]
        charts += [
            line_chart(
                "Norm of task vectors, relative to the base",
                across,
                blocks,
                dict(zip(found["experts"], norms)),
            ),
            line_chart(f"Error and interference at rank {rank}", across, blocks, around),
            line_chart(
                "Conflict, mean over pairs", across, blocks, pairs if len(found["experts"]) > 1 else {}
            ),
            line_chart("Effective rank, share of full rank", across, blocks, spread),
        ]
    return [c for c in charts if c]


# ------------------------------------------------------------ tables


def _by_rank(found: Json) -> Table | None:
    """R(k) and I(k) in numbers; no colours, for the rows are not of one kind."""
    rows = []
    for name, origin in found["origins"].items():
        rows.append((f"R(k) {_ORIGINS[name]}", origin["error_share"]))
        if None not in origin["interference"]:
            rows.append((f"I(k) {_ORIGINS[name]}", origin["interference"]))
    if not rows:
        return None
    plain = table([as_text(rank) for rank in found["ranks"]], rows)
    return plain._replace(
        rows=[(name, [cell._replace(heat=None) for cell in cells]) for name, cells in plain.rows]
    )


def _by_layer(found: Json, names: list[str]) -> dict[str, Table | None]:
    """What diagnoses found of each expert in each layer."""
    scopes, interference = found["diagnoses"]["scopes"], found["diagnoses"]["interference"]
    overlaps = [layer["overlap"] for layer in found["layers"]]
    values = {
        "undone": (interference["undone"], ".1%"),
        "sign_conflict": (interference["sign_conflict"], ".3f"),
        "inputs": ([_with_others(own, "inputs") for own in overlaps], ".3f"),
        "outputs": ([_with_others(own, "outputs") for own in overlaps], ".3f"),
        "ratio": (scopes["ratio"], ".4f"),
        "kl": (scopes["kl"], ".1e"),
        "share": (scopes["share"], ".1%"),
    }
    layers = [layer["layer"] for layer in found["layers"]]
    return {
        key: table(names, [(layer, row) for layer, row in zip(layers, rows) if row], form)
        if any(rows)
        else None
        for key, (rows, form) in values.items()
    }


def _with_others(overlap: Json | None, side: str) -> list[float | None] | None:
    """The mean overlap of each expert's subspaces with those of the others, over what it is by chance."""
    if overlap is None:
        return None
    found: list[float | None] = []
    for t, row in enumerate(overlap[side]):
        known = [value for j, value in enumerate(row) if j != t and value is not None]
        found.append(sum(known) / len(known) / overlap[f"{side}_by_chance"] if known else None)
    return found


def _energies(found: Json, origin: str) -> Table:
    rows = list(zip(found["experts"], found["origins"][origin]["energy"]))
    return table([as_text(rank) for rank in found["ranks"]], rows, ".0%")
