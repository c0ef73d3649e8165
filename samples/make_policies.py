"""Make the family of policies: a small Decision Transformer of all tasks as the base, and an expert tuned on each task.

    python samples/make_policies.py OUT    writes OUT/base, OUT/EXPERT and OUT/trajectories/TASK.npz, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from make.policy_family import write_base, write_expert, write_trajectories  # noqa: E402
from make.policy_tasks import TASKS  # noqa: E402


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--experts", nargs="+", choices=TASKS, default=[*TASKS], help="default: all")
    arguments = parser.parse_args()
    out: Path = arguments.out
    write_trajectories(out / "trajectories")
    if not (out / "base" / "model.safetensors").exists():
        print(write_base(out / "base"), flush=True)
    for name in arguments.experts:
        print(write_expert(name, out / "base", out / name), flush=True)


if __name__ == "__main__":
    main()
