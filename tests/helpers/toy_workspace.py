"""A workspace whose models are one weight each: a base and an expert of each of two tasks, and two merges of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergeline.tasks.workspace import Workspace

WIDTH = 4  # of the weight
TASKS = ("left", "right")

# What params.yaml holds, whatever the models are measured by.
FAMILY: dict[str, Any] = {
    "seed": 0,
    "checkpoints": {
        "layout": "as_is",
        "files": {name: f"in/{name}.safetensors" for name in ("base", *TASKS)},
        "uris": {},
    },
    "base": "base",
    "experts": [*TASKS],
    "merges": {
        "average": {"method": "average"},
        "sum": {"method": "task_arithmetic", "search": {"scale": [0.1, 0.5, 4.0]}},
    },
}


def save_weights(root: Path) -> None:
    """The checkpoints of the family, between the corners of their tasks and what lies half-way."""
    (root / "in").mkdir()
    ones = np.full(WIDTH, 0.5, np.float32)
    half = np.array([0.5, 0.5, -0.5, -0.5], np.float32)
    for name, weight in {"base": ones, "left": ones + half, "right": ones - 0.9 * half}.items():
        save_file({"w": weight}, root / "in" / f"{name}.safetensors")


# What params.yaml says of models that are measured by what `save_with_score` saved.
SCORED: dict[str, Any] = {
    "name": "own",
    "evaluate": {"folder": "measure", "function": "score:score", "suites": {task: [task] for task in TASKS}},
}


def save_with_score(root: Path, code: str) -> None:
    """The checkpoints of the family, and the code of a function `score` that measures them."""
    save_weights(root)
    (root / "measure").mkdir()
    (root / "measure/score.py").write_text(code)


def run_all(root: Path) -> Workspace:
    """Every stage of a workspace, one after the other."""
    workspace = Workspace(root / "params.yaml")
    workspace.tidy()
    for stage in workspace.stages:
        workspace.run(stage)
    return workspace
