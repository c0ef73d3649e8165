"""Programs that train families: how they are called, and trainings side by side."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable

# Of the processes that train. One BLAS thread each: spinning threads of two trainings slow each other down.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def pool(processes: int) -> ProcessPoolExecutor:
    """So many processes to train in."""
    os.environ.update(_ENVIRONMENT)
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def arguments(doc: str | None, **out: Any) -> argparse.ArgumentParser:
    """A program's arguments: OUT, and --processes. doc: its help; out: what else is said of OUT."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", **out)
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side (2)")
    return parser


def family_or_data(doc: str | None, names: Iterable[str]) -> argparse.Namespace:
    """The arguments of a program that writes a family into OUT, some experts or all, or its data into --data FOLDER."""
    parser = arguments(doc, nargs="?")
    parser.add_argument("--experts", nargs="+", choices=names, default=[*names], help="default: all")
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    found = parser.parse_args()
    if (found.out is None) == (found.data is None):
        parser.error("name OUT, or a FOLDER for --data")
    return found


def program(
    doc: str | None,
    names: Iterable[str],
    write_data: Callable[[Path], Any],
    write_base: Callable[[Path], Any],
    write_expert: Callable[[str, Path, Path], str],
) -> None:
    """A program that writes a family into OUT, some experts or all. write_data: what it measures them on, into OUT."""
    parser = arguments(doc)
    parser.add_argument("--experts", nargs="+", choices=names, default=[*names], help="default: all")
    given = parser.parse_args()
    write_data(given.out)
    write_family(given.out, given.experts, given.processes, write_base, write_expert)


def write_family(
    out: Path,
    experts: list[str],
    processes: int,
    write_base: Callable[[Path], Any],
    write_expert: Callable[[str, Path, Path], str],
) -> None:
    """OUT/base, unless it is there, and OUT/EXPERT, trained from it; what `write_expert` says of each is printed."""
    base = out / "base"
    with pool(processes) as trainings:
        if not (base / "model.safetensors").exists():
            if said := trainings.submit(write_base, base).result():
                print(said, flush=True)
        outs = [out / expert for expert in experts]
        for line in trainings.map(write_expert, experts, [base] * len(experts), outs):
            print(line, flush=True)
