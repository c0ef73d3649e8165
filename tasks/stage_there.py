"""A whole stage on a worker of the executor that a pipeline is spread over."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mergeline.tasks import progress, spread
from mergeline.tasks.modalities import modality_of
from mergeline.tasks.steps import steps

if TYPE_CHECKING:
    from mergeline.tasks.schema import Params
    from mergeline.tasks.step import Stage


def run_there(executor: Executor, params: Params, stage: Stage) -> str:
    """Run a stage of the workspace, which is the current folder, on a worker; returns what it says of itself."""
    return executor.submit(_run, spread.scene_of(params), stage).result()


def _run(scene: spread.Scene, stage: Stage) -> str:
    with spread.at(scene), TemporaryDirectory() as folder, progress.told(Path(folder), "stage") as told:
        step = next(step for step in steps(modality_of(scene.params)) if step.name == stage.step)
        step.run(scene.params, stage)
    return told.said
