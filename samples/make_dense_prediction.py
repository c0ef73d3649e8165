"""Make the dense family: a small SegFormer, and experts for labels, distances, normals and noise of drawn scenes.

    python samples/make_dense_prediction.py OUT    writes OUT/base, OUT/TASK and OUT/data/TASK.npz, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

from make.dense_family import TASKS, write_base, write_data, write_expert
from make.trainings import program

if __name__ == "__main__":
    program(__doc__, TASKS, lambda out: write_data(out / "data"), write_base, write_expert)
