"""Make the vision-language family: a small LLaVA as the base, and experts trained from it on one task each.

    python samples/make_vision_language.py OUT    writes OUT/base, OUT/EXPERT and OUT/data/TASK, in minutes on one core

Nothing is downloaded. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from make.vision_language_family import EXPERTS, write_base, write_data, write_expert  # noqa: E402


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=[*EXPERTS], help="default: all")
    arguments = parser.parse_args()
    out: Path = arguments.out
    write_data(out / "data")
    if not (out / "base" / "model.safetensors").exists():
        print(write_base(out / "base"), flush=True)
    for name in arguments.experts:
        print(write_expert(name, out / "base", out / name), flush=True)


if __name__ == "__main__":
    main()
