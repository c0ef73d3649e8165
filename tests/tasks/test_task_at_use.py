"""Where the task of an image is known when a merge is used, or found: what is fitted, applied, measured and told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_workspace import prepared
from safetensors.numpy import load_file

from mergeline.evaluation.state import load_state
from mergeline.merging import merge
from mergeline.merging.checkpoints.task_adapters import task_adapters
from mergeline.merging.compress import compress
from mergeline.merging.errors import UserError
from mergeline.merging.learning.fitting import fit
from mergeline.tasks.evaluate import evaluate_merge
from mergeline.tasks.modalities import modality_of

BUILD = Path("build")
CHECKPOINTS = BUILD / "checkpoints"


class Family:
    """Three experts, their images, and a few of them to fit to."""

    def __init__(self, root: Path):
        self.params = prepared(root).params
        self.modality = modality_of(self.params)
        self.examples = replace(self.modality.examples(self.params, BUILD), first=64)
        self.network = self.modality.network(self.params, BUILD, CHECKPOINTS / "base")
        self.evaluator = self.modality.evaluator(self.params, BUILD, CHECKPOINTS / "base")

    def recipe(self, method: str, **params: Any) -> dict[str, Any]:
        experts = {name: CHECKPOINTS / name for name in self.params.experts}
        return {"method": method, "params": params, "base": CHECKPOINTS / "base", "experts": experts}

    def fit(self, method: str, **params: Any) -> Any:
        return fit(self.recipe(method, **params), self.network, self.examples, Path("fits") / method)

    def right(self, model: Any) -> tuple[float, dict[str, Any]]:
        """The mean accuracy on val, and the scores."""
        found = self.evaluator.evaluate(model, ["val"], self.params.tasks)
        means = [
            self.modality.outcomes(BUILD, "val", task, found.answers[f"val/{task}"]).mean()
            for task in self.params.tasks
        ]
        return float(np.mean(means)), found.scores


@pytest.fixture
def family(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.chdir(workspace)
    return Family(workspace)


@pytest.mark.slow
def test_adapters_are_fitted_and_applied_to_their_tasks(family):
    recipe = family.fit("linear_adapter", inner="task_arithmetic", scale=0.3)
    assert recipe.method == "task_arithmetic" and recipe.params == {"scale": 0.3}
    merge(recipe, "out")
    plain, scores = family.right(load_state(Path("out")))
    assert scores == {}
    corrected, scores = family.right(Path("out"))
    assert corrected > plain + 0.03
    [at_use] = scores.values()
    assert (at_use["task"], at_use["how"]) == ("known", "linear")
    assert family.fit("linear_adapter", inner="task_arithmetic", scale=0.3) == recipe

    by_steps = family.fit("surgery", inner="task_arithmetic", scale=0.3, steps=60)
    merge(by_steps, "surgery")
    assert plain < family.right(Path("surgery"))[0]
    files = [dict(task_adapters(Path(out))["digits"].tensors) for out in ("out", "surgery")]
    assert [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in files] == [
        {"matrix": (128, 128), "offset": (128,)},
        {"down": (16, 128), "up": (128, 16)},
    ]


@pytest.mark.slow
def test_corrections_after_every_block_are_fitted_and_applied(family):
    family.examples = replace(family.examples, first=32)
    recipe = family.fit("surgery_v2", inner="task_arithmetic", scale=0.3, steps=40)
    merge(recipe, "out")
    [adapter, *_] = task_adapters(Path("out")).values()
    assert adapter.blocks == [f"transformer.resblocks.{i}" for i in range(4)]
    assert {tuple(t.shape) for t in adapter.tensors.values()} == {(16, 192), (192, 16)}
    plain, _ = family.right(load_state(Path("out")))
    corrected, scores = family.right(Path("out"))
    assert scores["at_use"]["how"] == "surgery_v2" and corrected > plain


@pytest.mark.slow
@pytest.mark.parametrize("method", ["routed_by_residual", "routed_by_features", "routed_by_network"])
def test_a_routed_store_answers_as_the_expert_that_it_finds(family, method):
    recipe = family.fit(method, rank=1.0)
    facts = json.loads((Path("fits") / method / "fit.json").read_text())["facts"]
    assert facts["seen"]["data"] == ("none" if method == "routed_by_residual" else "unlabelled")
    merge(recipe, "merges/routed")
    evaluate_merge(family.modality, family.params, BUILD, Path("merges/routed"), Path("evaluated"))
    at_use = json.loads(Path("evaluated/scores.json").read_text())["at_use"]
    assert (at_use["task"], at_use["passes"]) == ("found", 2)
    answers = load_file("evaluated/predictions.safetensors")
    for task in family.params.tasks:
        found = answers[f"val/{task}"]
        assert np.isclose((found >= 0).mean(), at_use["route"]["val"][task])
        assert at_use["route"]["test"][task] > 0.5  # by chance it is a third
        own = family.evaluator.evaluate(CHECKPOINTS / task, ["val"], [task]).answers[f"val/{task}"]
        same = (found == own)[found >= 0].mean()
        assert same > 0.98  # the store rounds


@pytest.mark.slow
def test_experts_that_add_token_by_token_are_measured_as_one_model(family):
    recipe = family.fit("smile_upscaling", k=16, gate_k=4)
    merge(recipe, "merges/smile")
    base, merged = load_state(CHECKPOINTS / "base"), load_state(Path("merges/smile"))
    assert all(torch.equal(merged[name], base[name]) for name in merged)
    evaluate_merge(family.modality, family.params, BUILD, Path("merges/smile"), Path("evaluated"))
    at_use = json.loads(Path("evaluated/scores.json").read_text())["at_use"]
    assert (at_use["task"], at_use["how"]) == ("found", "smile") and 1 < at_use["passes"] < 2
    assert "what experts add to it, token by token" in Path("merges/smile/README.md").read_text()
    files = task_adapters(Path("merges/smile")).values()
    assert at_use["bytes"] == sum(adapter.nbytes for adapter in files)
    assert min(at_use["route"]["val"].values()) > 0.34  # by chance it is a third
    plain, _ = family.right(merged)
    upscaled, _ = family.right(Path("merges/smile"))
    assert upscaled > plain + 0.1
    Path("merges/smile/adapters/digits.safetensors").unlink()
    merge(family.fit("linear_adapter", inner="task_arithmetic", scale=0.0), "other")
    shutil.copy("other/adapters/digits.safetensors", "merges/smile/adapters")
    with pytest.raises(UserError, match="is of another kind than those beside it"):
        family.right(Path("merges/smile"))


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(family):
    compress(family.recipe("tsv_compress"), "store")
    with pytest.raises(UserError, match="is a compressed store without a router"):
        family.evaluator.evaluate(Path("store"), ["val"], family.params.tasks)
    recipe = family.fit("routed_by_residual")
    two = dict(list(recipe.experts.items())[:2])
    with pytest.raises(UserError, match="chooses among digits, shapes, textures"):
        merge(recipe.model_copy(update={"experts": two}), "two")
    with pytest.raises(UserError, match="'average' keeps no store of experts"):
        family.fit("routed_by_residual", inner="average")
    with pytest.raises(UserError, match="inner: surgery knows or finds the task by itself"):
        family.fit("linear_adapter", inner="surgery")
