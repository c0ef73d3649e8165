"""The best merges without data of the whole catalogue on a family: chosen on validation, scored on test.

    python benchmarks/best_of_catalogue.py FAMILY/params.yaml WORK [--scales N] [--values N] [--best N]

Takes the merges of samples/leaderboard/params.yaml in place of the family's own. Of each grid `--values` values (2)
stay, from its first to its last. Scales there are of one family of eight experts: here they are `--scales` (4), evenly
spaced by their logarithms from half the smallest to twice the largest. WORK becomes a workspace, with the whole
leaderboard in WORK/table.md; the best are printed as a table's rows.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CATALOGUE = Path(__file__).parent.parent / "samples" / "leaderboard" / "params.yaml"


def thinned(values: list[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced from the first to the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / max(most - 1, 1))] for i in range(most)]


def widened(scales: list[float], count: int) -> list[float]:
    """So many scales, from half the smallest to twice the largest."""
    return [float(f"{scale:.3g}") for scale in np.geomspace(min(scales) / 2, 2 * max(scales), count)]


def adapted(merge: dict[str, Any], experts: int, scales: int, most: int) -> dict[str, Any]:
    """A merge of the catalogue with grids of this size, for a family of so many experts."""
    merge = copy.deepcopy(merge)
    if "values" in (params := merge.get("params", {})):
        params["values"] = [1] * experts
    search = merge.get("search", {})
    for name, values in search.items():
        if name == "members":
            search[name] = [*([one] for one in range(experts)), list(range(experts))]
        else:
            search[name] = widened(values, scales) if name == "scale" else thinned(values, most)
    return merge


def family_with_catalogue(params: Path, work: Path, scales: int, most: int) -> dict[str, Any]:
    """The family's params.yaml as `work` reads it, with the catalogue's merges, without gates and statistics."""
    family = yaml.safe_load(params.read_text())
    merges = yaml.safe_load(CATALOGUE.read_text())["merges"]
    for unwanted in ("gates", "statistics"):
        family.pop(unwanted, None)
    relocate(family, params.parent.absolute(), work.absolute())
    experts = len(family["experts"])
    family["merges"] = {name: adapted(merge, experts, scales, most) for name, merge in merges.items()}
    return family


def relocate(section: dict[str, Any], old: Path, new: Path) -> None:
    """Make paths that are relative to `old` (all `files`, and a suite) relative to `new`."""
    for name, value in section.items():
        if name == "suite":
            section[name] = os.path.relpath(old / value, new)
        elif name == "files":
            section[name] = {key: os.path.relpath(old / path, new) for key, path in value.items()}
        elif isinstance(value, dict):
            relocate(value, old, new)


def best_rows(table: str, most: int) -> list[str]:
    """The head of a leaderboard's table, and the rows of the merges that are best on validation."""
    # Methods that cannot run have a table of their own, below.
    first, _, _ = table[table.index("| merge |") :].partition("\n\n")
    head, line, *rows = first.splitlines()
    names = [cell.strip() for cell in head.split("|")]
    validation, method = names.index("validation"), names.index("method")
    merges = [row.split("|") for row in rows if row.split("|")[method].strip()]
    merges.sort(key=lambda cells: float(cells[validation]), reverse=True)
    return [head, line, *("|".join(cells) for cells in merges[:most])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("params", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--scales", type=int, default=4)
    parser.add_argument("--values", type=int, default=2)
    parser.add_argument("--best", type=int, default=5)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    written, table = args.work / "params.yaml", args.work / "table.md"
    family = family_with_catalogue(args.params, args.work, args.scales, args.values)
    written.write_text(yaml.safe_dump(family, sort_keys=False))
    command = ["mergeline", "sweep", "--params", str(written), "--out", str(table), "--force"]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    print(*best_rows(table.read_text(), args.best), sep="\n")


if __name__ == "__main__":
    main()
