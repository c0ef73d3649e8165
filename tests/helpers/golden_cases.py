"""Outputs of published reference implementations on small inputs: goldens/cases.json, one case a line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from checkpoints import State
from places import GOLDENS
from safetensors.torch import load_file

from mergeline.merging import merge_state_dicts
from mergeline.merging.compress import compress
from mergeline.merging.methods import catalogue

ALL = json.loads((GOLDENS / "cases.json").read_text())["cases"]
CASES = [case for case in ALL if case["method"] in catalogue()]


def path_of(case: dict[str, Any], stem: str) -> Path:
    return GOLDENS / "inputs" / case["input_set"] / f"{stem}.safetensors"


def recipe(case: dict[str, Any]) -> dict[str, Any]:
    def paths(files: str | list[str]) -> Path | list[Path]:
        return [GOLDENS / file for file in files] if isinstance(files, list) else GOLDENS / files

    return {
        "method": case["method"],
        "params": case["params"],
        "experts": {stem: path_of(case, stem) for stem in case["experts"]},
        "base": path_of(case, case["base"]) if case["base"] else None,
        "statistics": {kind: paths(files) for kind, files in case["statistics"].items()},
    }


def loaded(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `merge_state_dicts`."""

    def load(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: load(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [load(inner) for inner in value]
        return load_file(value) if isinstance(value, Path) else value

    return load(recipe(case))


@cache
def in_memory(name: str) -> State:
    return merge_state_dicts(**loaded(next(case for case in CASES if case["case"] == name)))


# Nothing that was published could be run on the inputs of the cases; their tests pin the formula.
WITHOUT_A_CASE = {
    "ace", "around", "cart_wudi", "dop", "drm", "ema", "free", "greedy_soup", "losparse", "magnitude_prune",
    "passthrough", "random_mix", "resmerge", "rmm", "robust_merge", "shared_basis", "solved", "star",
    "subspace_boosting", "svc", "svd_compress", "tatr", "truncate", "weighted", "weighted_truncate",
}  # fmt: skip


def task_models(case: dict[str, Any], folder: Path) -> State:
    """Every expert as it is given back."""
    found = {}
    for t in range(len(case["experts"])):
        given = loaded(case)
        merged = merge_state_dicts(**{**given, "params": {**given["params"], "task": t}})
        found |= {f"{t}/{name}": tensor for name, tensor in merged.items()}
    return found


def masks(case: dict[str, Any], folder: Path) -> State:
    """The masks of a compressed store."""
    compress(recipe(case), folder / "store.safetensors")
    stored, found = load_file(folder / "store.safetensors"), {}
    for name, like in load_file(path_of(case, case["base"])).items():
        for t in range(len(case["experts"])):
            bits = np.unpackbits(stored[f"{t}/mask/{name}"].numpy(), count=like.numel())
            found[f"{t}/{name}"] = torch.from_numpy(bits).reshape(like.shape)
    return found


def unified(case: dict[str, Any], folder: Path) -> State:
    """The unified vector of a compressed store, and the rescalers of its experts."""
    compress(recipe(case), folder / "store.safetensors")
    stored, once = load_file(folder / "store.safetensors"), "once/vector/"
    found = {f"unified/{k.removeprefix(once)}": v for k, v in stored.items() if k.startswith(once)}
    rescalers = [stored[f"{t}/rescaler"] for t in range(len(case["experts"]))]
    return {**found, "rescalers": torch.stack(rescalers)}


OUTPUTS = {"masks": masks, "task_models": task_models, "unified": unified}


def compared(case: dict[str, Any], folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of every tensor that is compared its name, what comes out here, and what the reference gave."""
    expected = load_file(GOLDENS / case["expected"])
    kind = OUTPUTS.get(case["output"])
    merged = kind(case, folder) if kind else in_memory(case["case"])
    for key in case["expected_keys"]:
        yield key, merged[key].double(), expected[key].double()


def beyond(case: dict[str, Any], a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements differ by more than the case's tolerance."""
    # "not within" instead of "beyond": a NaN is wrong too
    return int((~((a - b).abs() <= case["atol"] + case["rtol"] * b.abs())).sum())
