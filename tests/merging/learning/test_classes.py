"""Examples of one class, where they are not refused: what is fitted to them stays near the experts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_network import Family, make_family

from mergeline.merging import merge
from mergeline.merging.learning.fitting import FitNote, fit

COUNT = 24


def of_one_class(family: Family, task: str) -> Family:
    """All examples of one task are copies of one."""

    def batches() -> Any:
        for batch in family.examples.batches[task]():
            yield {
                **batch,
                "inputs": batch["inputs"][:1].repeat(len(batch["inputs"]), 1),
            }

    examples = replace(family.examples, batches={**family.examples.batches, task: batches})
    return replace(family, examples=examples)


@pytest.mark.parametrize(
    "method, params",
    [
        ("coefficients", {"objective": "cosine", "iterations": 2}),
        ("progressive_least_squares", {"inner": "average"}),
        ("progressive_least_squares", {"inner": "average", "errors": "classes"}),
        ("regmean_pp", {}),
        ("distill", {"inner": "average", "iterations": 2, "shifts": 0}),
        ("prodistill", {"epochs": 2}),
    ],
)
def test_features_of_one_class_are_fitted_to(method, params, tmp_path):
    family = of_one_class(make_family(tmp_path / "family", dtype=torch.float32, count=COUNT), "b")
    job: Path = tmp_path / "job"
    told = (
        "the expert of 'b' takes all 24 examples for class" if method in ("coefficients", "distill") else ""
    )
    with pytest.warns(FitNote, match=told) if told else nullcontext():
        recipe = fit(
            {**family.recipe, "method": method, "params": params}, family.network, family.examples, job
        )
    merge(recipe, tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    base = family.states["base"]
    farthest = max((state[n] - base[n]).norm() for state in family.states.values() for n in base)
    for name, value in merged.items():
        assert torch.isfinite(value).all() and (value - base[name]).norm() < 3 * farthest, name
