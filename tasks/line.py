"""What lies between models: how well points of the line, or of the plane, through them do on the tasks of a pipeline.

Models that were fine-tuned from one base can be merged where the line between them has no barrier (linear mode
connectivity, Frankle et al. 2020, arXiv 1912.05671); those that were trained independently must be aligned first. The
plane through three models shows the valley that they lie in (Garipov et al. 2018, arXiv 1802.10026).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from mergeline.merging.api import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.inputs import places_of
from mergeline.merging.engine.places import refuse_file
from mergeline.merging.errors import UserError
from mergeline.tasks.evaluate import mean_outcomes

if TYPE_CHECKING:
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

POINTS = 11
POINTS_OF_PLANE = 9  # along each of its axes
_MARGIN = 0.2  # around the three models, of the larger extent of what they span
_FLAT = 1e-6  # what the third model is at least away from the line, relative to the longer side

Progress = Callable[[int, int], None]


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
    progress: Progress | None = None,
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

    if points < 3:
        raise UserError(f"{points} points: a line has its ends and what is between them; give 3 or more")
    _refuse_page(page, [a, *others.values()], force)
    shares = _spaced(0.0, 1.0, points)
    measure = _measure(modality, params, build, a, split)
    lines: dict[str, Any] = {}
    for name, other in others.items():
        at: list[dict[str, float]] = []
        for share in shares:
            at.append(measure({name: other}, [share]))
            if progress:
                progress(len(lines) * points + len(at), points * len(others))
        means = list(map(_mean, at))
        lines[name] = {
            "points": at,
            "means": means,
            "barrier": barrier(shares, means),
            "distance": _product(a, other, other) ** 0.5,
        }
    measured = {**_about(modality, params, a, split), "shares": shares, "lines": lines}
    if page:
        render_line(page, measured)
    return measured


def measured_plane(
    modality: Modality,
    params: Params,
    build: Path,
    a: Path,
    others: Mapping[str, Path],
    *,
    points: int = POINTS_OF_PLANE,
    split: str = "val",
    page: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `points` times `points` models of the plane through `a` and two others, as JSON values.

    corners: where the three lie, (x, y) in L2 distances: the first at (0, 0), the second at (its distance, 0). xs, ys:
    the coordinates of the models that were measured, a fifth beyond the corners. weights: of the three models, at
    [y][x], with the sum 1; points: the mean outcome by task there, larger is better; means over tasks. best: the
    indexes [y, x] of the largest mean. page: where the same is written as HTML.

    Raises:
        UserError: as `measured_line`; other than two others; three models on one line.
    """
    from mergeline.evaluation.pages.line import render_plane

    if points < 3:
        raise UserError(f"{points} points: give 3 or more along each axis of a plane")
    if len(others) != 2:
        raise UserError(f"a plane goes through three models, and {1 + len(others)} are given; give A B C")
    (name_b, b), (name_c, c) = others.items()
    _refuse_page(page, [a, b, c], force)
    uu, uv, vv = _product(a, b, b), _product(a, b, c), _product(a, c, c)
    width = uu**0.5
    along = uv / width if width else 0.0
    height = max(vv - along**2, 0.0) ** 0.5
    if min(width, height) <= _FLAT * max(width, vv**0.5):
        raise UserError(f"{a}, {name_b} and {name_c} lie on one line, and in no plane; leave --plane out")
    margin = _MARGIN * max(max(width, along) - min(0.0, along), height)
    xs = _spaced(min(0.0, along) - margin, max(width, along) + margin, points)
    ys = _spaced(-margin, height + margin, points)
    measure = _measure(modality, params, build, a, split)
    weights, at = [], []
    for i, y in enumerate(ys):
        third = [y / height] * points
        second = [(x - along * share) / width for x, share in zip(xs, third)]
        weights.append([[1 - s - t, s, t] for s, t in zip(second, third)])
        row = []
        for weight in weights[-1]:
            row.append(measure(others, weight[1:]))
            if progress:
                progress(i * points + len(row), points**2)
        at.append(row)
    means = [list(map(_mean, row)) for row in at]
    best = max(((k, i) for k in range(points) for i in range(points)), key=lambda ki: means[ki[0]][ki[1]])
    measured = {
        **_about(modality, params, a, split),
        "corners": {
            a.name if a.name not in others else str(a): [0.0, 0.0],
            name_b: [width, 0.0],
            name_c: [along, height],
        },
        "xs": xs,
        "ys": ys,
        "weights": weights,
        "points": at,
        "means": means,
        "best": list(best),
    }
    if page:
        render_plane(page, measured)
    return measured


def barrier(shares: list[float], means: list[float]) -> float:
    """The most by which values lie below the straight line between the first and the last; 0 at least."""
    straight = (means[0] + share * (means[-1] - means[0]) for share in shares)
    return max(0.0, *(line - mean for line, mean in zip(straight, means)))


def _refuse_page(page: Path | None, models: Sequence[Path], force: bool) -> None:
    from mergeline.evaluation.pages.page import is_page

    read = places_of(models)
    if page:
        refuse_file(page, read, is_page, "page", force)


def _about(modality: Modality, params: Params, a: Path, split: str) -> dict[str, Any]:
    return {"a": str(a), "split": split, "measure": modality.measure, "tasks": list(params.tasks)}


def _measure(
    modality: Modality, params: Params, build: Path, a: Path, split: str
) -> Callable[[Mapping[str, Path], Sequence[float]], dict[str, float]]:
    """What merges `a` with other models, of given weights, the rest being its own, and gives the mean outcomes by task.

    Tensors that the others lack, such as a tower that was not trained, are those of `a`.
    """
    evaluator = modality.evaluator(params, build, a)

    def measure(others: Mapping[str, Path], weights: Sequence[float]) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=build) as folder:
            out = Path(folder) / "point"
            recipe = {
                "method": "task_arithmetic",
                "params": {"weights": list(weights), "scale": 1.0},
                "base": a,
                "experts": dict(others),
                "heads": modality.heads(params, build),
            }
            merge(recipe, out)
            found = evaluator.evaluate(out, [split], params.tasks)
        return mean_outcomes(modality, build, found, split)

    return measure


def _mean(point: Mapping[str, float]) -> float:
    return sum(point.values()) / len(point)


def _spaced(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def _product(origin: Path, a: Path, b: Path) -> float:
    """<a - origin, b - origin> over the floating-point tensors of one shape that all three have."""
    start, left, right = map(open_checkpoint, (origin, a, b))
    product = 0.0
    for name, info in start.tensors.items():
        shapes = {found.shape for c in (left, right) if (found := c.tensors.get(name))}
        if info.is_float and shapes == {info.shape} and name in left.tensors and name in right.tensors:
            zero = start.read(name).double()
            product += float(((left.read(name).double() - zero) * (right.read(name).double() - zero)).sum())
    return product
