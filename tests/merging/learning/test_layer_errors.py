"""Where a merge's activations part from those of the experts, and whose layer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import pytest
import torch
from checkpoints import refused
from safetensors.torch import save_file
from tiny_network import Family, make_family
from torch import Tensor

from mergeline.merging.learning.layer_errors import layer_errors


def average(family: Family, share: float = 0.8) -> dict[str, Tensor]:
    """The base and a share of what the experts changed in the mean."""
    base = family.states["base"]
    experts = [family.states[name] for name in family.recipe["experts"]]
    return {key: v + share * (sum(e[key] for e in experts) / len(experts) - v) for key, v in base.items()}


def measured(family: Family, folder: Path, merge: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file(dict(merge), folder / "merge.safetensors")
    recipe = family.recipe
    return layer_errors(
        family.network, family.examples, recipe["base"], folder / "merge.safetensors", recipe["experts"]
    )


def test_of_an_average_nothing_is_said(tmp_path):
    found = measured(family := make_family(tmp_path), tmp_path, average(family))
    assert found["advice"] == []
    assert all(m < b for own in found["tasks"].values() for m, b in zip(own["merge"][1:], own["base"][1:]))


def test_the_layer_that_went_wrong_is_named(tmp_path):
    """From the second layer on the merge is worse than the base; the third itself does nothing wrong."""
    family = make_family(tmp_path)
    merge = average(family)
    noise = torch.Generator().manual_seed(5)
    weight = merge["layers.1.attn.weight"]
    merge["layers.1.attn.weight"] = weight + 3 * torch.randn(
        weight.shape, generator=noise, dtype=weight.dtype
    )
    found = measured(family, tmp_path, merge)
    assert [(a["experts"], a["layers"]) for a in found["advice"]] == [([name], (1, 2)) for name in "abc"]
    assert "after layers 1-2" in found["advice"][0]["sentence"]
    assert "most is added in layers.1" in found["advice"][0]["sentence"]
    for own in found["tasks"].values():
        assert own["stages"] == ["before", "layers.0", "layers.1", "layers.2", "after"]
        assert own["own"][3] < own["base"][3] < own["merge"][3]


def test_an_expert_has_no_errors_on_its_own_task(tmp_path):
    family = make_family(tmp_path)
    found = measured(family, tmp_path, family.states["b"])
    assert found["tasks"]["b"]["merge"] == found["tasks"]["b"]["own"] == [0.0] * 5
    assert found["tasks"]["a"]["merge"][3] > 0


def test_errors_are_relative_distances(tmp_path):
    family = make_family(tmp_path)
    merge = average(family)
    found = measured(family, tmp_path, merge)["tasks"]["a"]
    inputs = torch.cat([batch["inputs"] for batch in family.examples.of("a")])

    def passed(state: Mapping[str, Tensor], x: Tensor, first: int, last: int) -> Tensor:
        for i in range(first, last + 1):
            x = torch.tanh(x @ state[f"layers.{i}.attn.weight"].T + state[f"layers.{i}.attn.bias"])
        return x

    expert = family.states["a"]
    for k in range(3):
        goal, entered = passed(expert, inputs, 0, k), passed(expert, inputs, 0, k - 1)
        for key, given in (
            ("merge", passed(merge, inputs, 0, k)),
            ("own", passed(merge, entered, k, k)),
            ("base", passed(family.states["base"], inputs, 0, k)),
        ):
            expected = float((given - goal).norm() / goal.norm())
            assert found[key][k + 1] == pytest.approx(expected, rel=1e-5), key


def test_a_model_of_another_shape_is_refused(tmp_path):
    family = make_family(tmp_path)
    merge = average(family) | {"gain": torch.ones(7, dtype=torch.float64)}
    with refused("gain", "7", "6"):
        measured(family, tmp_path, merge)
