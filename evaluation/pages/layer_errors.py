"""The page of a merge's errors by layer: what `mergeline layer-errors` measured, as curves and advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeline.evaluation.pages.charts import line_chart
from mergeline.evaluation.pages.page import Table, table, write_page

Json = dict[str, Any]

_LINES = {"merge": "merge", "own": "of the layer itself", "base": "base"}


def render_layer_errors(path: Path, found: Json) -> None:
    """Write the page to `path`, the same bytes for the same results.

    found: what `tasks.layer_errors.measured_errors` returns.

    Raises:
        UserError: the file cannot be written.
    """
    charts, tables = [], {}
    for task, own in found["tasks"].items():
        lines = {label: own[key] for key, label in _LINES.items()}
        charts.append(line_chart(task, "stage of the model", range(len(own["stages"])), lines))
        tables[task] = table(own["stages"], list(lines.items()))
    ensembles = found.get("ensembles")
    write_page(
        path,
        "layer_errors.html.jinja",
        {},
        found=found,
        charts=[chart for chart in charts if chart],
        tables=tables,
        ensembles=ensembles,
        agreement=_agreement(ensembles) if ensembles else None,
    )


def _agreement(ensembles: Json) -> Table:
    ways = {"merge": "merge", "logits": "mean of logits", "features": "mean of features"}
    lines = {**ensembles["tasks"], "all tasks": ensembles["mean"]}
    return table([*ways.values()], [(task, [own[way] for way in ways]) for task, own in lines.items()])
