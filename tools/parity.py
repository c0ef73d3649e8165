"""`python tools/parity.py` measures what the catalogue says of methods: flows/measured.json, docs/parity.md.

Golden cases: by how much a merge differs from the output of another implementation. Readings: how often the tensor of
an expert that is read most often is read, with default parameters.
"""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY / "tests" / "helpers"))

from golden_cases import CASES, WITHOUT_A_CASE, beyond, compared  # noqa: E402
from places import GOLDENS  # noqa: E402

from mergeline.flows.catalogue import MEASURED  # noqa: E402
from mergeline.merging import api, merge_state_dicts  # noqa: E402
from mergeline.merging.algebra.statistics import STATISTICS  # noqa: E402
from mergeline.merging.engine.sources import MemoryInputs  # noqa: E402
from mergeline.merging.methods import catalogue  # noqa: E402

PAGE = REPOSITORY / "docs" / "parity.md"
_FAMILY = GOLDENS / "inputs" / "elementwise"

_HEAD = """\
# Parity

Written by `python tools/parity.py`, which runs the golden cases: outputs of other implementations, on small inputs,
in `tests/goldens` ([cases.json](../tests/goldens/cases.json) has the parameters, and the file and function of each
source). `python -m pytest tests/merging/methods/test_goldens.py` holds every merge to them. What the methods are:
[methods.md](methods.md).

An element is within the tolerance if |a − b| ≤ atol + rtol · |b|, b being the other implementation's. Of
discontinuous methods, whose masks and elections may turn over by rounding, a few elements may lie beyond it,
as many as are *allowed*. *Absolute* is the largest |a − b| of any element; *relative* the same over the largest |b| of
its tensor; *used* the largest |a − b| / (atol + rtol · |b|), so that it exceeds 1 where elements lie beyond. The
differences were measured on one machine; another may round otherwise.

| method | case | source | atol | rtol | absolute | relative | used | beyond | allowed |
|---|---|---|---|---|---|---|---|---|---|"""

_DRAWN = """\
Two more cases have no output to equal, but a distribution: over many seeds, how often entries are dropped and by
how much the others are rescaled. `test_draws_over_many_seeds_follow_the_stated_distribution` holds the draws to it
within four standard deviations."""

_NO_METHOD = """\
`extract_lora-expert0-r4` is of extracting a LoRA, which describes what one expert changed and merges nothing. The
collection that the cases are from also has some of kind `unit`: single steps of methods. Those of `adarank` (its
first merge too), `adamerging`, `atlas`, `concrete`, `expert_merging` and `fw_merging`, which are fitted to
examples, are held by `tests/merging/learning/test_goldens_of_fits.py`, that of `tangent` by
`tests/merging/learning/test_tangent.py`, those of weight matching, which is [a command](permutations.md), and of
`pleas` by `tests/merging/permutations/test_goldens_of_permutations.py`, those of `map_pareto`, which is [a way to
search](search.md#pareto-fronts), by `tests/merging/algebra/test_surrogate.py`. The others are of methods that are
[left out](methods.md#left-out): `mc_smoe` and `sub_moe` merge the experts of a mixture by its router's statistics
(`tests/merging/algebra/test_expert_groups.py`), and the factors of the former are those of
[`losparse`](methods.md#losparse) (`test_low_rank_sparse.py` there). One is a toy of `regmean`."""

_NO_CASE = """\
The collection has no outputs of {}. Their tests hold them to properties that pin the formula: hand-computed examples,
limits in which they equal another method, and invariances."""


def measured() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(case, Path(folder)) for case in CASES]
    return {"readings": {id: readings(id) for id in catalogue()}, "cases": sorted(rows, key=_order)}


def row(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A golden case, how far from it a merge is, and what of it was declared."""
    found = {key: case[key] for key in ("method", "case", "kind", "source", "atol", "rtol")}
    found["allowed"] = case["max_mismatch_elements"]
    if case["kind"] != "merge":
        return found
    absolute = relative = used = 0.0
    wrong = 0
    for _, a, b in compared(case, folder):
        apart = (a - b).abs()
        largest = float(apart.max())
        absolute = max(absolute, largest)
        relative = max(relative, largest / (float(b.abs().max()) or 1.0))
        bound = case["atol"] + case["rtol"] * b.abs()
        used = max(used, float(torch.where(apart > 0, apart / bound, 0.0).max()))
        wrong += beyond(case, a, b)
    shown = {"absolute": absolute, "relative": relative, "used": used if case["atol"] else None}
    return found | {k: v and float(f"{v:.2g}") for k, v in shown.items()} | {"beyond": wrong}


def readings(id: str) -> int:
    """How often the tensor of an expert that is read most often is read, rounded up."""
    entry = catalogue()[id]
    experts = {f"expert{t}": load_file(_FAMILY / f"expert{t}.safetensors") for t in range(4)}
    kinds = entry.statistics_of(entry.resolve({}))
    given: dict[str, Any] = {"instruction": experts["expert0"]}
    given["solved"] = dict(list(experts["expert0"].items())[:1])  # the others are merged
    given["coefficients"] = {}
    given |= {k: [load_file(_FAMILY / f"{k}{t}.safetensors") for t in range(4)] for k in ("fisher", "gram")}
    count = entry.experts[1] or 4
    statistics = {k: given[k] if STATISTICS[k].for_all else given[k][:count] for k in kinds}
    read: Counter[str] = Counter()

    class Counted(MemoryInputs):
        def read(self, origin: str, name: str, start: int, stop: int) -> torch.Tensor:
            read[name] += (stop - start) * (origin != "base")
            return super().read(origin, name, start, stop)

    plain, api.MemoryInputs = api.MemoryInputs, Counted
    try:
        merge_state_dicts(
            id,
            dict(list(experts.items())[:count]),
            load_file(_FAMILY / "base.safetensors"),
            params={"iterations": 1} if "iterations" in entry.parameters else {},
            statistics=statistics,
        )
    finally:
        api.MemoryInputs = plain
    sizes = {name: prod(tensor.shape) * count for name, tensor in experts["expert0"].items()}
    return max(-(-read[name] // size) for name, size in sizes.items() if size)


def page(found: dict[str, Any]) -> str:
    """docs/parity.md."""
    lines = [_HEAD]
    for case in (case for case in found["cases"] if case["kind"] == "merge"):
        names = (
            f"| [{case['method']}](methods.md#{case['method']}) | {case['case']} | {_source(case['source'])} "
        )
        numbers = [case[k] for k in ("atol", "rtol", "absolute", "relative", "used", "beyond", "allowed")]
        lines.append(names + "".join(f"| {'–' if n is None else f'{n:g}'} " for n in numbers) + "|")
    names = [f"`{id}`" for id in sorted(WITHOUT_A_CASE)]
    lines += ["", _DRAWN, "", "## Cases without a method", "", _filled(_NO_METHOD), ""]
    alone = f"{', '.join(names[:-1])} and {names[-1]}"
    lines += ["## Methods without a case", "", _filled(_NO_CASE.format(alone)), ""]
    return "\n".join(lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _source(source: str) -> str:
    """The repository and commit, of a source that names them."""
    repository, at, rest = source.partition("@")
    commit = rest.partition(":")[0]
    link = f"[{repository}@{commit[:8]}](https://github.com/{repository}/tree/{commit})"
    return link if at else "formula reconstructed, no code"


def _order(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["case"]


if __name__ == "__main__":
    result = measured()
    MEASURED.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))
    print(f"wrote {MEASURED} and {PAGE}")
