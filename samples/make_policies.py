"""Make the family of policies: a small Decision Transformer as the base, and an expert tuned on each task.

    python samples/make_policies.py OUT    writes OUT/base, OUT/EXPERT and OUT/trajectories/TASK.npz, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

from make.policy_family import TASKS, write_base, write_expert, write_trajectories
from make.trainings import program

if __name__ == "__main__":
    program(__doc__, TASKS, lambda out: write_trajectories(out / "trajectories"), write_base, write_expert)
