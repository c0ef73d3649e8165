"""Make two families of image classifiers with a head each: a small ViT of timm, a small ResNet of transformers.

    python samples/make_classifiers.py OUT    writes OUT/{vit,resnet}/family/{base,TASK,data}, in minutes on two cores

See README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from make.classifier_family import ARCHITECTURES, write_base, write_expert
from make.classifier_tasks import TASKS, task_arrays
from make.trainings import arguments, pool


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the training steps (1); less for a trial"
    )
    given = parser.parse_args()
    write_families(given.out, given.processes, given.share)


def write_families(out: Path, processes: int, share: float) -> None:
    families = {architecture: out / architecture / "family" for architecture in ARCHITECTURES}
    for task in TASKS:
        arrays = task_arrays(task)
        kept = {name: array for name, array in arrays.items() if not name.startswith("train")}
        for family in families.values():
            (family / "data").mkdir(parents=True, exist_ok=True)
            np.savez_compressed(family / "data" / f"{task}.npz", **kept)
    with pool(processes) as trainings:
        bases = {a: trainings.submit(write_base, a, family, share) for a, family in families.items()}
        experts = []
        for architecture, base in bases.items():
            base.result()
            experts += [
                trainings.submit(write_expert, architecture, task, families[architecture], share)
                for task in TASKS
            ]
        for expert in experts:
            print(expert.result(), flush=True)


if __name__ == "__main__":
    main()
