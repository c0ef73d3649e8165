"""The second family: four other tasks, experts of the first one's base. No setting of a method was tuned on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from make.catalogue import SECOND_TASKS
from make.finetuning import finetune
from make.packaging import ARRAYS, write_family
from make.second_tasks import task_arrays

STEPS = 150  # of training, which is in float32: few processors are fast in bfloat16


def make_second(base: Path, work: Path, out: Path) -> None:
    """Write base/, experts/, data/ and suite.yaml into the folder `out`; experts that lie in `work` stay.

    base: the model of the first family, model.safetensors.
    """
    work.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(base, work / "base.safetensors")
    for task in SECOND_TASKS:
        if not (work / f"expert_{task}.safetensors").exists():
            np.savez(work / f"{task}.npz", **task_arrays(task))
            finetune(task, work, STEPS, torch.float32)
    write_family(SECOND_TASKS, (*ARRAYS, "fit_x"), work, out)
