"""The compare step: one leaderboard of base, experts and merges with intervals, and the tables for plots."""

from __future__ import annotations

import csv
import io
import json
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics import bootstrap_mean, normalised, paired, wilson
from merging.checkpoint import open_checkpoint
from merging.files import publish, staged, write_bytes, write_json
from tasks.evaluate import which_are_right

if TYPE_CHECKING:
    import numpy as np

    from tasks.params import Params

    Correct = dict[str, np.ndarray]  # task -> which test examples are right, bool (N)


def compare(params: Params, build: Path, out: Path) -> None:
    """Read `build/` and write the leaderboard folder `out`.

    leaderboard.json: every row with intervals, lineage, and paired comparisons of all merges. metrics.json: the
    numbers alone, for `dvc metrics`. models.csv and search.csv: for `dvc plots`. The candidate is the merge with
    the best mean on the validation split; the test split only reports.
    """
    right = {name: correct(params, build, name) for name in ["base", "experts", *params.merges]}
    known = {
        kind: {task: float(c.mean()) for task, c in right[kind].items()} for kind in ("base", "experts")
    }
    rows = [_row(params, build, name, right[name], known) for name in right]
    merges = {row["name"]: row for row in rows if row["kind"] == "merge"}
    leaderboard = {
        "pipeline": params.name,
        "tasks": params.tasks,
        "candidate": max(merges.values(), key=lambda row: row["val_mean"])["name"],
        "rows": rows,
        "pairs": [_pair(a, b, right) for i, a in enumerate(merges) for b in list(merges)[i + 1 :]],
        "lineage": _lineage(params, build),
    }
    if params.language:
        leaderboard["language"] = params.language.model_dump(mode="json")
    with staged(out) as partial:
        write_json(partial / "leaderboard.json", leaderboard)
        write_json(partial / "metrics.json", {row["name"]: _numbers(row) for row in rows})
        _write_csv(partial / "models.csv", [{"model": row["name"], "mean": row["mean"]} for row in rows])
        _write_csv(partial / "search.csv", _search_points(params, build))
        publish(partial, out)


def correct(params: Params, build: Path, name: str, split: str = "test") -> Correct:
    """Which examples of a split a model gets right, task by task; `experts` stands for each expert on its own task."""
    from safetensors.numpy import load_file

    def right(predictions: np.ndarray, task: str) -> np.ndarray:
        return which_are_right(
            predictions, None if params.language else build / "data" / task / f"{split}_y.npy"
        )

    if name in params.merges:
        found = load_file(build / "evaluations" / name / "predictions.safetensors")
        return {task: right(found[f"{split}/{task}"], task) for task in params.tasks}
    found = load_file(build / "evaluations" / "baselines" / "predictions.safetensors")
    if name == "base":
        return {task: right(found[f"base/{split}/{task}"], task) for task in params.tasks}
    owners = params.owners.items()
    return {task: right(found[f"{expert}/{split}/{task}"], task) for task, expert in owners}


def _row(
    params: Params, build: Path, name: str, right: Correct, known: dict[str, dict[str, float]]
) -> dict[str, Any]:
    experts = known["experts"]
    estimate = bootstrap_mean(right)
    accuracy = {task: float(c.mean()) for task, c in right.items()}
    own = {task: value for task, value in accuracy.items() if task in experts}
    validation = correct(params, build, name, "val")
    row: dict[str, Any] = {
        "name": name,
        "kind": "merge" if name in params.merges else name,
        "val_mean": float(sum(c.mean() for c in validation.values()) / len(validation)),
        "mean": estimate.mean,
        "lower": estimate.lower,
        "upper": estimate.upper,
        "normalised": normalised(own, experts) if own else None,
        "worst_task": min(accuracy.values()),
        "tasks": {task: _task(c, experts.get(task)) for task, c in right.items()},
    }
    if params.language:
        row |= _language(params, build, name, accuracy, known)
    if name in params.merges:
        manifest = json.loads((build / "merges" / name / "manifest.json").read_text())
        search = json.loads((build / "search" / f"{name}.json").read_text())
        row |= {
            "method": manifest["recipe"]["method"],
            **({"experts": own} if (own := params.merges[name].experts) else {}),
            "params": search["chosen"],
            "searched": len(search["points"]),
            "digest": manifest["output"]["digest"],
            "bytes": manifest["output"]["bytes"],
            **_norms(params, build, name),
        }
    return row


def _language(
    params: Params, build: Path, name: str, accuracy: dict[str, float], known: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What rows of language models say besides: gains kept, means held in and out, perplexity, lm-eval's own numbers.

    gain_kept: the mean over tasks of (accuracy - base) / (expert - base), of tasks that an expert learned. Experts are
    those that the merge is made of; tasks of the others are held out.
    """
    made_of = params.experts_of(name) if name in params.merges else params.experts
    base = known["base"]
    experts = {task: value for task, value in known["experts"].items() if params.owners[task] in made_of}
    kept = [(accuracy[t] - base[t]) / (e - base[t]) for t, e in experts.items() if t in accuracy and e > base[t]]
    held = {
        "held_in": [a for task, a in accuracy.items() if task in experts],
        "held_out": [a for task, a in accuracy.items() if task not in experts],
    }
    found: dict[str, Any] = {key: sum(values) / len(values) for key, values in held.items() if values}
    if kept and name not in ("base", "experts"):
        found["gain_kept"] = sum(kept) / len(kept)
    folder = build / "evaluations" / (name if name in params.merges else "baselines")
    scores = json.loads((folder / "scores.json").read_text())
    if name == "experts":
        return found
    own = scores if name in params.merges else scores["models"]["base"]
    found |= {"perplexity": own["perplexity"], "lm_eval": own["lm_eval"]["test"]}
    return found | ({"checks": own["checks"]} if "checks" in own else {})


def _task(right: np.ndarray, expert: float | None) -> dict[str, Any]:
    count, n = int(right.sum()), len(right)
    lower, upper = wilson(count, n)
    return {
        "accuracy": count / n,
        "lower": lower,
        "upper": upper,
        "n": n,
        "normalised": count / n / expert if expert else None,
    }


def _norms(params: Params, build: Path, name: str) -> dict[str, Any]:
    """Norm of (merged - base) over the mean norm of its task vectors, and whether every weight is finite."""
    import torch

    merged = open_checkpoint(build / "merges" / name)
    base = open_checkpoint(build / "checkpoints" / params.base)
    square, finite = 0.0, True
    for tensor, info in merged.tensors.items():
        if info.is_float:
            value = merged.read(tensor).double()
            finite = finite and bool(torch.isfinite(value).all())
            start = base.read(tensor).double() if tensor in base.tensors else value
            rows = min(len(value), len(start)) if value.dim() else None  # of vocabularies that differ, what both have
            square += float(((value[:rows] - start[:rows] if rows is not None else value - start) ** 2).sum())
    description = json.loads((build / "extract" / "description.json").read_text())
    norms = [description["experts"][expert]["norm"] for expert in params.experts_of(name)]
    return {"norm_ratio": sqrt(square) / (sum(norms) / len(norms)) if finite else None, "finite": finite}


def _pair(a: str, b: str, right: dict[str, Correct]) -> dict[str, Any]:
    found = paired(right[a], right[b])
    return {"a": a, "b": b, **found._asdict()}


def _lineage(params: Params, build: Path) -> dict[str, Any]:
    def digest(name: str) -> str:
        return json.loads((build / "checkpoints" / name / "provenance.json").read_text())["digest"]

    return {
        "base": {"name": params.base, "source": params.sources[params.base], "digest": digest(params.base)},
        "experts": {
            name: {"source": params.sources[name], "digest": digest(name)} for name in params.experts
        },
    }


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    names = (
        "mean", "lower", "upper", "val_mean", "normalised", "worst_task", "norm_ratio",
        "gain_kept", "held_in", "held_out",
    )  # fmt: skip
    numbers = {name: row[name] for name in names if row.get(name) is not None}
    return numbers | {f"perplexity_{task}": found["value"] for task, found in row.get("perplexity", {}).items()}


def _search_points(params: Params, build: Path) -> list[dict[str, Any]]:
    points = []
    for name in params.merges:
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
