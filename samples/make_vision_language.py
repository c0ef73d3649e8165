"""Make the vision-language family: a small LLaVA as the base, and experts trained from it on one task each.

    python samples/make_vision_language.py OUT    writes OUT/base, OUT/EXPERT and OUT/data/TASK, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

from make.trainings import program
from make.vision_language_family import EXPERTS, write_base, write_data, write_expert

if __name__ == "__main__":
    program(__doc__, EXPERTS, lambda out: write_data(out / "data"), write_base, write_expert)
