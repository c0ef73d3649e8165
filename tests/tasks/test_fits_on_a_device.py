"""Fits of image towers on a device that refuses the CPU's tensors: they answer as those of the CPU do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerator import accelerator
from safetensors.numpy import load_file
from small_workspace import SmallWorkspace, save_small_family

from mergeline.tasks.workspace import Workspace

pytestmark = pytest.mark.slow

# Each in the few steps that reach all of its code. Of labels, and by forward derivatives, there are none here.
FITS: dict[str, dict[str, Any]] = {
    "adarank": {"iterations": 2},
    "concrete": {"iterations": 2},
    "distill": {"iterations": 2, "inner": "progressive_least_squares", "errors": "classes"},
    "pleas": {},
    "prodistill": {"epochs": 1},
    "regmean_pp": {},
    "routed_by_network": {},
    "smile_upscaling": {},
    "surgery": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", FITS)
def test_what_is_fitted_there_answers_as_what_is_fitted_here(method, tmp_path, monkeypatch):
    here = fitted(tmp_path / "here", method, "cpu", monkeypatch)
    with accelerator() as device:
        there = fitted(tmp_path / "there", method, device, monkeypatch)
    assert here.keys() == there.keys() and here
    for split, answers in here.items():  # Adam makes a step of any slope, also of one that is rounding
        assert len(answers) >= 40 and (there[split] == answers).mean() > 0.95, split


def fitted(root: Path, method: str, device: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What the merge that was fitted answers, by split and task."""

    def settings(params: dict[str, Any]) -> None:
        params["device"] = device
        params["merges"] = {method: {"method": method, "params": FITS[method], "images": 10}}

    save_small_family(root)
    SmallWorkspace(root).edit(settings)
    monkeypatch.chdir(root)
    workspace = Workspace("params.yaml")
    for stage in workspace.stages:
        if stage.name not in ("baselines", "compare"):
            workspace.run(stage)
    return load_file(root / f"build/evaluations/{method}/predictions.safetensors")
