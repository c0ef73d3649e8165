"""A workspace whose checkpoints, data and heads are there, as the first steps leave them."""

from __future__ import annotations

from pathlib import Path

from mergeline.evaluation.datasets import prepare
from mergeline.tasks.clip import places
from mergeline.tasks.clip.heads import write_heads
from mergeline.tasks.data_step import dataset
from mergeline.tasks.workspace import Workspace


def prepared(root: Path) -> Workspace:
    """The workspace in `root`, which is the current folder, with what models are measured on and by."""
    opened = Workspace(root / "params.yaml")
    params, build = opened.params, root / "build"
    (build / "checkpoints").mkdir(parents=True)
    for name, source in params.checkpoints.files.items():
        (build / "checkpoints" / name).symlink_to(source)
    for task, source in params.datasets.files.items():
        prepare(source, dataset(build, task), params.datasets.image_size)
    datasets = {task: dataset(build, task) for task in params.tasks}
    base = build / "checkpoints" / params.base
    write_heads(base, Path(params.suite), datasets, places.heads(build), params.device)
    return opened
