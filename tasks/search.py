"""The search step: try every setting of a merge's grid, score each on the validation split, take the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.vision import load_state
from merging.engine import merge_points, merge_state_dicts_points, one_thread
from merging.factors import FolderStore
from merging.files import staged, write_json
from merging.sweep import in_batches
from tasks.evaluate import make_evaluator

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.vision import Evaluator
    from tasks.params import Merge, Params

_MERGED_BYTES = 1 << 29  # of merged models in memory at a time
_MERGED_FILES = 8  # merged models on the disk at a time


def search(
    grid: Merge,
    base: Path,
    experts: dict[str, Path],
    heads: Path,
    datasets: dict[str, Path],
    out: Path,
    *,
    factors: Path,
    seed: int,
    device: str,
) -> None:
    """Write the validation accuracy of every point of `grid`, and the best setting, to the JSON file `out`.

    The test split is never read. Of equal points the first is taken. Without a grid there is nothing to score.
    `factors` is a folder that keeps spectral decompositions for other searches and merges.

    Raises:
        UserError: as `merging.merge_state_dicts`.
    """
    points = list(grid.points)
    scores: dict[int, dict[str, Any]] = {}
    if grid.search:
        states = {name: load_state(folder) for name, folder in experts.items()}
        reference = load_state(base)
        size = sum(tensor.nbytes for tensor in next(iter(states.values())).values())
        with one_thread():
            evaluator = make_evaluator(base, heads, datasets, device)
            for batch in in_batches(points, max(1, _MERGED_BYTES // size)):
                merged = merge_state_dicts_points(
                    grid.method,
                    states,
                    reference,
                    points=[points[i] for i in batch],
                    seed=seed,
                    factors=FolderStore(factors),
                )
                scores |= {i: _accuracy(evaluator, state, list(datasets)) for i, state in zip(batch, merged)}
                del merged  # before the next batch is there
    _write(out, grid, points, scores)


def search_language(
    params: Params, name: str, base: Path, experts: dict[str, Path], out: Path, *, factors: Path, scratch: Path
) -> None:
    """`search` for language models, which may be larger than memory: points are merged to the disk, a few at a time."""
    from tasks.evaluate_language import make_evaluator, validation_accuracy

    grid = params.merges[name]
    points = list(grid.points)
    scores: dict[int, dict[str, Any]] = {}
    if grid.search:
        recipe = {"method": grid.method, "base": base, "experts": experts, "seed": params.seed, "dtype": grid.dtype}
        evaluator = make_evaluator(params)
        for batch in in_batches(points, _MERGED_FILES):
            with staged(scratch) as place:
                recipes = [({**recipe, "params": points[i]}, place / str(i)) for i in batch]
                merge_points(recipes, device=params.device, workers=1, factors=factors)
                scores |= {i: validation_accuracy(params, evaluator, place / str(i)) for i in batch}
    _write(out, grid, points, scores)


def _write(out: Path, grid: Merge, points: list[dict[str, Any]], scores: dict[int, dict[str, Any]]) -> None:
    scored = [{"params": points[i], **scores[i]} for i in sorted(scores)]
    best = max(scored, key=lambda point: point["mean"])["params"] if scored else points[0]
    write_json(out, {"method": grid.method, "points": scored, "chosen": best})


def _accuracy(evaluator: Evaluator, state: dict[str, Tensor], tasks: list[str]) -> dict[str, Any]:
    """Validation accuracy on each task, and its mean."""
    predictions = evaluator.predict(state, "val", tasks)
    right = {task: predictions[task] == evaluator.data[task].split("val")[1] for task in tasks}
    accuracy = {task: float(r.mean()) for task, r in right.items()}
    return {"mean": sum(accuracy.values()) / len(accuracy), "tasks": accuracy}
