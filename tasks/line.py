"""What lies between two models: how well points of the line from one to the other do on the tasks of a pipeline.

Models that were fine-tuned from one base can be merged where the line between them has no barrier (linear mode
connectivity, Frankle et al. 2020, arXiv 1912.05671); those that were trained independently must be aligned first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

from mergeline.merging.api import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.inputs import files_of
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.tasks.evaluate import mean_outcomes

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

POINTS = 11


def measured_line(
    modality: Modality,
    params: Params,
    build: Path,
    a: Path,
    others: Mapping[str, Path],
    *,
    points: int = POINTS,
    split: str = "val",
    page: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure `points` models on the line from `a` to each of `others` (name -> checkpoint), as JSON values.

    shares: of the other model, from 0 to 1. lines: to each, by its name: `points`, the mean outcome by task at each
    share, larger is better; `means` over tasks; `barrier`, the most by which these lie below the straight line between
    the ends; `distance`, the L2 norm of what parts them. page: where the same is written as HTML.

    Raises:
        UserError: fewer than three points; models that do not fit one another, or are not measured; a place that holds
            something else.
    """
    from mergeline.evaluation.pages.line import render_line
    from mergeline.evaluation.pages.page import is_page

    if points < 3:
        raise UserError(f"{points} points: a line has its ends and what is between them; give 3 or more")
    read = [file for path in (a, *others.values()) for file in (path, *files_of(open_checkpoint(path)))]
    if page:
        refuse_file(page, read, is_page, "page", force)
    shares = [i / (points - 1) for i in range(points)]
    evaluator = modality.evaluator(params, build, a)
    done, lines = 0, {}
    for name, other in others.items():
        at: list[dict[str, float]] = []
        for share in shares:
            with tempfile.TemporaryDirectory(dir=build) as folder:
                out = Path(folder) / "point"
                recipe = {
                    "method": "linear",
                    "params": {"weights": [1 - share, share]},
                    "experts": {"a": a, "b": other},
                    "heads": modality.heads(params, build),
                }
                merge(recipe, out)
                found = evaluator.evaluate(out, [split], params.tasks)
            at.append(mean_outcomes(modality, build, found, split))
            done += 1
            if progress:
                progress(done, points * len(others))
        means = [sum(point.values()) / len(point) for point in at]
        lines[name] = {
            "points": at,
            "means": means,
            "barrier": barrier(shares, means),
            "distance": _distance(a, other),
        }
    measured = {
        "a": str(a), "split": split, "measure": modality.measure, "tasks": list(params.tasks), "shares": shares,
        "lines": lines,
    }  # fmt: skip
    if page:
        render_line(page, measured)
    return measured


def barrier(shares: list[float], means: list[float]) -> float:
    """The most by which values lie below the straight line between the first and the last; 0 at least."""
    straight = (means[0] + share * (means[-1] - means[0]) for share in shares)
    return max(0.0, *(line - mean for line, mean in zip(straight, means)))


def _distance(a: Path, b: Path) -> float:
    """The L2 norm of the difference of the floating-point tensors of one shape that both have."""
    left, right = open_checkpoint(a), open_checkpoint(b)
    squares = 0.0
    for name, info in left.tensors.items():
        if name in right.tensors and info.is_float and right.tensors[name].shape == info.shape:
            squares += float((left.read(name).double() - right.read(name).double()).square().sum())
    return squares**0.5
