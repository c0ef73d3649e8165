"""The compare step: one leaderboard of base, experts and merges with intervals, and the tables for plots."""

from __future__ import annotations

import csv
import io
import json
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeline.evaluation.measures import Measure, Measures
from mergeline.evaluation.metrics import Outcomes, bootstrap_mean, in_scores, interval, normalised, paired
from mergeline.evaluation.pages.figures import at_use
from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.checkpoints.quantised.formats import dequantised
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.files import publish, staged, write_bytes, write_json
from mergeline.tasks.credentials import without_credentials
from mergeline.tasks.evaluate import PREDICTIONS, SCORES, read_outcomes
from mergeline.tasks.leaderboard import candidate_row, numbers
from mergeline.tasks.modality import Known
from mergeline.tasks.seen import seen

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
    from mergeline.tasks.modality import Modality
    from mergeline.tasks.schema import Params

Means = dict[str, float]  # task -> mean test outcome

_METRICS = ("mean", "val_mean", "normalised", "worst_task")  # of the candidate, in metrics.json


def compare(modality: Modality, params: Params, build: Path, out: Path) -> None:
    """Read `build/` and write the leaderboard folder `out`.

    leaderboard.json: every row with intervals, lineage, and paired comparisons of all merges; "accuracy" is the mean
    score of a task, whatever it measures ("measures"). metrics.json: the numbers by which runs are compared, for
    `dvc metrics` and `dvc exp show`. models.csv and search.csv: for `dvc plots`. The candidate is the merge with the
    best mean on the validation split, less what any merge looks at; the test split only reports. Merges to which the
    task is known, or found, when they are used ("at_use") are candidates only where there are no others, and are paired
    with their like.

    Raises:
        UserError: an outcome is NaN or infinite; an expert has no example right.
    """
    outcomes = {
        name: _outcomes(modality, params, build, name, "test")
        for name in ["base", "experts", *params.all_merges]
    }
    known = {name: {task: float(o.mean()) for task, o in outcomes[name].items()} for name in outcomes}
    measures = Measures(modality.measures(params))
    # The ratio of a score to that of an expert says nothing where the expert's is negative, or smaller ones are better.
    ratios = all(mean >= 0 and not measures.of(task).lower for task, mean in known["experts"].items())
    scores = {name: _scores(params, build, name) for name in outcomes}
    rows = [
        _row(modality, params, build, name, outcomes[name], known, scores, measures, ratios)
        for name in outcomes
    ]
    merges = {row["name"]: row for row in rows if row["kind"] == "merge"}

    def preferred(row: dict[str, Any]) -> tuple[bool, float]:
        return not at_use(row), measures.mean.turned(row["val_mean"])

    leaderboard = {
        "pipeline": params.name,
        "modality": modality.name,
        **measures.as_json(),
        "tasks": params.tasks,
        "candidate": max(merges.values(), key=preferred)["name"],
        "rows": rows,
        "pairs": [
            _pair(a, b, outcomes, measures.mean)
            for i, a in enumerate(merges)
            for b in list(merges)[i + 1 :]
            if at_use(merges[a]) == at_use(merges[b])
        ],
        "lineage": _lineage(params, build),
        **modality.settings(params),
    }
    with staged(out) as partial:
        write_json(partial / "leaderboard.json", leaderboard)
        write_json(partial / "metrics.json", _metrics(modality, leaderboard))
        _write_csv(partial / "models.csv", [{"model": row["name"], "mean": row["mean"]} for row in rows])
        _write_csv(partial / "search.csv", _search_points(params, build))
        publish(partial, out)


def _metrics(modality: Modality, leaderboard: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The candidate's numbers, and the mean of every merge: a number is a column of DVC's tables."""
    best = candidate_row(leaderboard)
    means = {row["name"]: row["mean"] for row in leaderboard["rows"] if row["kind"] == "merge"}
    kept = {name: value for name, value in numbers(best).items() if name in _METRICS}
    return {"candidate": kept | modality.metrics(best), "mean": means}


def _outcomes(modality: Modality, params: Params, build: Path, name: str, split: str) -> Outcomes:
    """The outcomes of a model on a split by task, (N); `experts` stands for each expert on its own tasks."""
    if name in params.all_merges:
        predictions = build / "evaluations" / name / PREDICTIONS
        return read_outcomes(modality, build, predictions, split, params.tasks)
    predictions = build / "evaluations" / "baselines" / PREDICTIONS
    if name == "base":
        return read_outcomes(modality, build, predictions, split, params.tasks, model="base")
    found: dict[str, np.ndarray] = {}
    for task, expert in params.owners.items():
        found |= read_outcomes(modality, build, predictions, split, [task], model=expert)
    return found


def _row(
    modality: Modality,
    params: Params,
    build: Path,
    name: str,
    outcomes: Outcomes,
    known: dict[str, Means],
    scores: dict[str, dict[str, Any]],
    measures: Measures,
    ratios: bool,
) -> dict[str, Any]:
    experts, means, mean = known["experts"], known[name], measures.mean
    estimate = bootstrap_mean(outcomes)
    lower, upper = mean.turned_interval(estimate.lower, estimate.upper)
    own = {task: value for task, value in means.items() if task in experts}
    validation = _outcomes(modality, params, build, name, "val")
    if params.learns:
        validation = {task: o[modality.choosing(build, task)] for task, o in validation.items()}
    row: dict[str, Any] = {
        "name": name,
        "kind": "merge" if name in params.all_merges else name,
        "val_mean": mean.turned(float(sum(o.mean() for o in validation.values()) / len(validation))),
        "mean": mean.turned(estimate.mean),
        "lower": lower,
        "upper": upper,
        "normalised": normalised(own, experts) if own and ratios else None,
        # Scores that measure different things have no smallest.
        "worst_task": None if measures.different else mean.turned(min(means.values())),
        "tasks": {
            task: _task(o, measures.of(task), experts.get(task) if ratios else None)
            for task, o in outcomes.items()
        },
    }
    row |= modality.row(params, name, Known(means, known["base"], experts, scores[name], scores["base"]))
    if name in params.all_merges:
        manifest = json.loads((build / "merges" / name / "manifest.json").read_text())
        search = json.loads((build / "search" / f"{name}.json").read_text())
        row |= {
            **({"at_use": scores[name]["at_use"]} if "at_use" in scores[name] else {}),
            "method": search["method"],
            **({"experts": chosen} if (chosen := params.all_merges[name].experts) else {}),
            "seen": seen(manifest),
            "params": search["chosen"],
            "searched": len(search["points"]),
            **({"search": search["search"]} if "search" in search else {}),
            "digest": manifest["output"]["digest"],
            "bytes": manifest["output"]["bytes"],
            **({"requantised": manifest["requantised"]} if "requantised" in manifest else {}),
            # A store holds no weights of one model.
            **(
                {"norm_ratio": None, "finite": True}
                if "store" in manifest
                else _norms(modality, params, build, name)
            ),
        }
    return row


def _scores(params: Params, build: Path, name: str) -> dict[str, Any]:
    """What scores.json says of a model; nothing of the experts together."""
    if name in params.all_merges:
        return json.loads((build / "evaluations" / name / SCORES).read_text())
    if name == "base":
        return json.loads((build / "evaluations" / "baselines" / SCORES).read_text())["models"]["base"]
    return {}


def _task(outcome_N: np.ndarray, measure: Measure, expert: float | None) -> dict[str, Any]:
    mean = float(outcome_N.mean())
    lower, upper = measure.turned_interval(*interval(outcome_N))
    return {
        "accuracy": measure.turned(mean),
        "lower": lower,
        "upper": upper,
        "n": len(outcome_N),
        "normalised": mean / expert if expert else None,
    }


def _norms(modality: Modality, params: Params, build: Path, name: str) -> dict[str, Any]:
    """Norm of (merged - base) over the mean norm of its task vectors, and whether every weight is finite."""
    import torch

    merged, _ = dequantised(open_checkpoint(build / "merges" / name))
    base, _ = dequantised(open_checkpoint(build / "checkpoints" / params.base))
    if base.tensors.keys().isdisjoint(merged.tensors):  # under another prefix
        base = _as_merged(modality, params, build) or base
    square, finite = 0.0, True
    with Files() as files:
        for tensor, info in merged.tensors.items():
            if info.is_float:
                value = _values(files, info)
                finite = finite and bool(torch.isfinite(value).all())
                start = _values(files, base.tensors[tensor]) if tensor in base.tensors else value
                rows = (
                    min(len(value), len(start)) if value.dim() else None
                )  # of vocabularies that differ, what both have
                square += float(
                    ((value[:rows] - start[:rows] if rows is not None else value - start) ** 2).sum()
                )
    description = json.loads((build / "extract" / "description.json").read_text())
    norms = [description["experts"][expert]["norm"] for expert in params.made_of(name)]
    return {"norm_ratio": sqrt(square) / (sum(norms) / len(norms)) if finite else None, "finite": finite}


def _values(files: Files, info: TensorInfo) -> Tensor:
    """A tensor in float64, as a merge reads it."""
    return info.read(files.elements, 0, prod(info.shape)).double().reshape(info.shape)


def _as_merged(modality: Modality, params: Params, build: Path) -> Checkpoint | None:
    """The base under the names that the experts have."""
    folder = build / "checkpoints"
    experts = {expert: folder / expert for expert in params.experts}
    heads = modality.heads(params, build)
    recipe = {"method": "average", "base": folder / params.base, "experts": experts, "heads": heads}
    return make_plan(recipe).base


def _pair(a: str, b: str, outcomes: dict[str, Outcomes], measure: Measure) -> dict[str, Any]:
    return {"a": a, "b": b, **in_scores(paired(outcomes[a], outcomes[b]), measure)._asdict()}


def _lineage(params: Params, build: Path) -> dict[str, Any]:
    def origin(name: str) -> dict[str, str]:
        found = json.loads((build / "checkpoints" / name / "provenance.json").read_text())
        return {"source": without_credentials(params.sources[name]), "digest": found["digest"]}

    return {
        "base": {"name": params.base, **origin(params.base)},
        "experts": {name: origin(name) for name in params.experts},
    }


def _search_points(params: Params, build: Path) -> list[dict[str, Any]]:
    points = []
    for name in params.all_merges:
        for point in json.loads((build / "search" / f"{name}.json").read_text())["points"]:
            points.append({"merge": name, "mean": point["mean"], **point["params"]})
    return points


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table of all keys of all rows, in the order they come; cells that a row lacks stay empty."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
