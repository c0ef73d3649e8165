"""The search step: try every setting of a merge's grid in memory, score each on the validation split, take the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from merging import merge_state_dicts
from merging.engine import one_thread
from merging.files import write_json
from tasks.evaluate import make_evaluator
from tasks.extract import StoredFactors

if TYPE_CHECKING:
    from tasks.params import Merge


def search(
    grid: Merge,
    base: Path,
    experts: dict[str, Path],
    extracted: Path,
    heads: Path,
    datasets: dict[str, Path],
    out: Path,
    *,
    seed: int,
    device: str,
) -> None:
    """Write the validation accuracy of every point of `grid`, and the best setting, to the JSON file `out`.

    The test split is never read. Of equal points the first is taken. Without a grid there is nothing to score.

    Raises:
        UserError: as `merging.merge_state_dicts`.
    """
    points = list(grid.points)
    scored = _score(points, grid, base, experts, extracted, heads, datasets, seed, device) if grid.search else []
    best = max(scored, key=lambda point: point["mean"])["params"] if scored else points[0]
    write_json(out, {"method": grid.method, "points": scored, "chosen": best})


def _score(
    points: list[dict],
    grid: Merge,
    base: Path,
    experts: dict[str, Path],
    extracted: Path,
    heads: Path,
    datasets: dict[str, Path],
    seed: int,
    device: str,
) -> list[dict]:
    from evaluation.vision import load_state

    states = {name: load_state(folder) for name, folder in experts.items()}
    reference = load_state(base)
    factors = StoredFactors(extracted)
    scored = []
    with one_thread():
        evaluator = make_evaluator(base, heads, datasets, device)
        for params in points:
            merged = merge_state_dicts(grid.method, states, reference, params=params, seed=seed, factors=factors)
            found = evaluator.predict(merged, "val", list(datasets))
            accuracy = {
                task: float((classes == evaluator.data[task].split("val")[1]).mean()) for task, classes in found.items()
            }
            scored.append({"params": params, "mean": sum(accuracy.values()) / len(accuracy), "tasks": accuracy})
    return scored
