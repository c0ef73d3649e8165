"""The search step: try every setting of a merge's grid in memory, score each on the validation split, take the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.vision import load_state
from merging import merge_state_dicts
from merging.engine import one_thread
from merging.files import write_json
from tasks.evaluate import make_evaluator
from tasks.extract import StoredFactors

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.vision import Evaluator
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
    scored: list[dict[str, Any]] = []
    if grid.search:
        states = {name: load_state(folder) for name, folder in experts.items()}
        reference = load_state(base)
        factors = StoredFactors(extracted)
        with one_thread():
            evaluator = make_evaluator(base, heads, datasets, device)
            for params in points:
                merged = merge_state_dicts(
                    grid.method, states, reference, params=params, seed=seed, factors=factors
                )
                scored.append({"params": params, **_accuracy(evaluator, merged, list(datasets))})
    best = max(scored, key=lambda point: point["mean"])["params"] if scored else points[0]
    write_json(out, {"method": grid.method, "points": scored, "chosen": best})


def _accuracy(evaluator: Evaluator, state: dict[str, Tensor], tasks: list[str]) -> dict[str, Any]:
    """Validation accuracy on each task, and its mean."""
    predictions = evaluator.predict(state, "val", tasks)
    right = {task: predictions[task] == evaluator.data[task].split("val")[1] for task in tasks}
    accuracy = {task: float(r.mean()) for task, r in right.items()}
    return {"mean": sum(accuracy.values()) / len(accuracy), "tasks": accuracy}
