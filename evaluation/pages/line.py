"""The page of the lines between models: what `mergeline line` measured, as curves and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeline.evaluation.pages.charts import line_chart
from mergeline.evaluation.pages.page import counted, write_page

Json = dict[str, Any]


def render_line(path: Path, found: Json) -> None:
    """Write the page to `path`, the same bytes for the same results.

    found: what `tasks.line.measured_line` returns.

    Raises:
        UserError: the file cannot be written.
    """
    shares, lines = found["shares"], found["lines"]
    across = "share of the other model"
    charts = [line_chart("All tasks", across, shares, {name: line["means"] for name, line in lines.items()})]
    if len(found["tasks"]) > 1:
        charts += [
            line_chart(
                task,
                across,
                shares,
                {name: [p[task] for p in line["points"]] for name, line in lines.items()},
            )
            for task in found["tasks"]
        ]
    write_page(path, "line.html.jinja", {"counted": counted}, found=found, charts=[c for c in charts if c])
