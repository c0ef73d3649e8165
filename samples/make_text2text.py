"""Make the text-to-text family: a small T5 over whole words as the base, and experts trained from it on one task each.

    python samples/make_text2text.py OUT    writes OUT/base, OUT/EXPERT and OUT/data/TASK, in minutes

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

from make.text2text_family import EXPERTS, write_base, write_data, write_expert
from make.trainings import program

if __name__ == "__main__":
    program(__doc__, EXPERTS, lambda out: write_data(out / "data"), write_base, write_expert)
