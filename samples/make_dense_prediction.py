"""Make the dense family: a small SegFormer, and experts for labels, distances, normals and noise of drawn scenes.

    python samples/make_dense_prediction.py OUT    writes OUT/base, OUT/TASK and OUT/data/TASK.npz, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from make.dense_family import TASKS, write_base, write_data, write_expert  # noqa: E402
from make.trainings import arguments, write_family  # noqa: E402


def main() -> None:
    given = arguments(__doc__).parse_args()
    write_data(given.out / "data")
    write_family(given.out, [*TASKS], given.processes, write_base, write_expert)


if __name__ == "__main__":
    main()
