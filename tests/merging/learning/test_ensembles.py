"""Averaging against ensembling: whose predictions agree with the experts', and when averaging is to blame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping

import pytest
import torch
from checkpoints import refused
from safetensors.torch import save_file
from test_layer_errors import average
from tiny_network import Family, make_family
from torch import Tensor

from mergeline.merging.learning.ensembles import ensembles


def measured(family: Family, folder: Path, merge: Mapping[str, Tensor]) -> dict[str, Any]:
    save_file(dict(merge), folder / "merge.safetensors")
    recipe = family.recipe
    return ensembles(
        family.network, family.examples, recipe["base"], folder / "merge.safetensors", recipe["experts"]
    )


def test_agreement_is_counted_over_the_examples(tmp_path):
    family = make_family(tmp_path)
    merge = average(family)
    found = measured(family, tmp_path, merge)
    network, names = family.network, list(family.recipe["experts"])
    for task in names:
        batches = list(family.examples.of(task))

        def passed(
            state: Mapping[str, Tensor], task: str = task, batches: Any = batches
        ) -> tuple[Tensor, Tensor]:
            network.load(state)
            features = torch.cat([network.features(batch) for batch in batches])
            return features, network.logits(features, task)

        outputs = {name: passed(family.states[name]) for name in names}
        right = outputs[task][1].argmax(1)
        logits = sum(logit for _, logit in outputs.values())
        features = network.logits(sum(feature for feature, _ in outputs.values()) / 3, task)
        for way, logit in (("merge", passed(merge)[1]), ("logits", logits), ("features", features)):
            expected = float((logit.argmax(1) == right).double().mean())
            assert found["tasks"][task][way] == pytest.approx(expected), way
    means = [found["tasks"][task]["merge"] for task in names]
    assert found["mean"]["merge"] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_of_a_merge_as_good_as_an_ensemble_nothing_is_said(tmp_path):
    """Of one expert merge, logits and features are its own."""
    family = make_family(tmp_path, experts=1)
    found = measured(family, tmp_path, family.states["a"])
    assert found["mean"] == {"merge": 1, "logits": 1, "features": 1} and found["advice"] == []


def test_what_averaging_loses_is_told(tmp_path):
    """A merge of noise, beside experts that agree with one another."""
    family = make_family(tmp_path, experts=1, count=60)
    noise = torch.Generator().manual_seed(2)
    merge = {
        k: torch.randn(v.shape, generator=noise, dtype=v.dtype) for k, v in family.states["base"].items()
    }
    found = measured(family, tmp_path, merge)
    [advice] = found["advice"]
    assert "agrees with the tasks' experts on 100.0% of examples" in advice["sentence"]
    assert found["mean"]["merge"] < 0.8


def test_models_without_classes_are_refused(tmp_path):
    family = make_family(tmp_path)
    family.network = replace(family.network, score=None)
    with refused("predict no classes"):
        measured(family, tmp_path, average(family))
