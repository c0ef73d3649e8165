"""Least squares without data: what is drawn, what is chosen of it, and what is said of the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import refused
from learned_families import LearnedFamily, learned_family
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.engine.card import model_card
from mergeline.merging.engine.manifest import read_manifest
from mergeline.merging.learning.contract import Job
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Examples, Pictures
from mergeline.merging.learning.procedural import pictures
from mergeline.merging.learning.stand_ins import beside, stand_ins
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.verify import verify
from mergeline.tasks.seen import seen

METHOD = "dataless_least_squares"
SMALL = {"inner": "average", "pool": 36, "chosen": 8}


def prepared(drawn: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(drawn.copy()).permute(0, 3, 1, 2).float() / 128 - 1


@pytest.fixture
def family(tmp_path: Path) -> LearnedFamily:
    found = learned_family("open_clip", tmp_path)
    return replace(found, network=replace(found.network, pictures=Pictures(16, prepared)))


def no_examples(family: LearnedFamily) -> Examples:
    """Of the family's tasks, that nobody may look at."""

    def touched() -> Any:
        pytest.fail("examples were looked at")

    plain = family.examples(4)
    return replace(plain, batches=dict.fromkeys(family.experts, touched))


def test_a_picture_depends_on_seed_and_number_alone():
    together = pictures(range(24), 18, 3)
    assert together.shape == (24, 18, 18, 3) and together.dtype == np.uint8
    assert all(np.array_equal(together[i], pictures([i], 18, 3)[0]) for i in (0, 7, 23))
    assert len({picture.tobytes() for picture in together}) == 24
    assert not np.array_equal(together[0], pictures([0], 18, 4)[0])
    assert all(int(np.ptp(picture)) > 0 for picture in together[:12])
    assert pictures([], 18, 3).shape == (0, 18, 18, 3)


def test_each_expert_is_given_what_its_task_vector_moves_most(family, tmp_path):
    """Written out for a tower in which two experts differ from the base in one map each way."""
    base = load_file(tmp_path / "base/model.safetensors")
    name = next(n for n in base if n.endswith("0.mlp.c_fc.weight"))
    torch.manual_seed(1)
    taus = [torch.randn(len(base[name]), 1) * torch.randn(1, base[name].shape[1]) for _ in range(2)]
    for expert, tau in zip(family.experts, taus):
        save_file({**base, name: base[name] + tau}, tmp_path / expert / "model.safetensors")
    job = Job(Recipe.of(family.recipe(METHOD)), family.network, no_examples(family), tmp_path / "job")
    found = stand_ins(job, 8, 36)
    family.network.load(base)
    inputs: list[torch.Tensor] = []
    module = family.network.module.transformer.resblocks[0].mlp.c_fc
    handle = module.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        family.network.features({"images": prepared(pictures(range(36), 16, 0))})
    handle.remove()
    a = torch.stack([(inputs[0] @ tau.T).square().flatten(1).sum(1) / tau.square().sum() for tau in taus])
    score = (a / a.sum(0)).log()
    score = score - score.mean(1, keepdim=True)
    for t, expert in enumerate(family.experts):
        chosen = sorted((score[t] - score[1 - t]).argsort(descending=True)[:8].tolist())
        expected = prepared(pictures(chosen, 16, 0))
        assert torch.equal(torch.cat([batch["images"] for batch in found.of(expert)]), expected)
    assert found.owners == {name: name for name in family.experts} and found.count("e0") == 8


def test_the_result_says_that_it_saw_no_data_and_where_its_settings_are_from(family, tmp_path):
    recipe = fit(family.recipe(METHOD, **SMALL), family.network, no_examples(family), tmp_path / "fit")
    assert recipe.fitted is not None and recipe.fitted.data == "none" and recipe.fitted.examples == {}
    assert recipe.fitted.words == "no data; procedural images"
    assert recipe.fitted.chosen_on == "validation images of the sample family"
    manifest = merge(recipe, tmp_path / "merged")
    assert seen(read_manifest(tmp_path / "merged"))["words"] == "no data; procedural images"
    text = model_card(manifest)
    assert (
        "to no data, but to procedural images. Default settings were chosen on validation images of the"
        in text
    )
    assert verify(tmp_path / "merged")
    assert Recipe.of(json.loads((tmp_path / "fit/fit.json").read_text())["recipe"]) == recipe
    again = fit(family.recipe(METHOD, **SMALL), family.network, no_examples(family), tmp_path / "second")
    first, second = (load_file(tmp_path / f / "solved.safetensors") for f in ("fit", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert again.fitted == recipe.fitted


def test_the_fit_is_nearer_to_the_experts_on_pictures_of_theirs_than_the_start(family, tmp_path):
    recipe = family.recipe(METHOD, **{**SMALL, "ridge": 0.1})
    merge(fit(recipe, family.network, no_examples(family), tmp_path / "fit"), tmp_path / "merged.safetensors")
    merge(family.recipe("average"), tmp_path / "start.safetensors")
    job = Job(Recipe.of(recipe), family.network, no_examples(family), tmp_path / "job")
    drawn = {task: next(iter(stand_ins(job, 8, 36).of(task)))["images"] for task in family.experts}
    far = {
        name: sum(
            float((family.features(tmp_path / name, x) - family.features(tmp_path / task, x)).norm())
            for task, x in drawn.items()
        )
        for name in ("start.safetensors", "merged.safetensors")
    }
    assert far["merged.safetensors"] < 0.7 * far["start.safetensors"]


def test_models_without_images_and_pools_that_are_too_small_are_refused(family, tmp_path):
    with refused("a pool of 4 has no 8 images"):
        fit(
            family.recipe(METHOD, **{**SMALL, "pool": 4}), family.network, no_examples(family), tmp_path / "a"
        )
    words = learned_family("llama", tmp_path / "llama")
    with refused("draws images, which these models do not take"):
        fit(words.recipe(METHOD, **SMALL), words.network, words.examples(4), tmp_path / "b")


def test_drawn_images_are_fitted_beside_those_at_hand(family, tmp_path):
    own = family.examples(4)
    job = Job(Recipe.of(family.recipe(METHOD)), family.network, own, tmp_path / "job")
    drawn = stand_ins(job, 8, 36)
    both = beside(replace(own, first=3), drawn)
    for task in family.experts:
        found = [batch["images"] for batch in both.of(task)]
        here = [batch["images"] for batch in own.of(task)] + [batch["images"] for batch in drawn.of(task)]
        assert torch.equal(torch.cat(found), torch.cat([torch.cat(here)[:3], torch.cat(here)[4:]]))
        assert both.count(task) == 11
    settings = {"inner": "average", "ridge": 0.1, "shifts": 0}
    merged = {}
    for count in (0, 8):
        recipe = family.recipe("progressive_least_squares", **settings, drawn=count)
        fitted = fit(recipe, family.network, own, tmp_path / f"fit{count}")
        assert fitted.fitted is not None and fitted.fitted.data == "unlabelled"
        merged[count] = merge(fitted, tmp_path / f"{count}.safetensors")
        words = "4 unlabelled a task of fit" + " and procedural images" * bool(count)
        assert fitted.fitted.words == words and f"to data: {words}." in model_card(merged[count])

    def far(count: int) -> float:
        """From the experts, on what was drawn."""
        return sum(
            float(
                (
                    family.features(tmp_path / f"{count}.safetensors", x)
                    - family.features(tmp_path / task, x)
                ).norm()
            )
            for task in family.experts
            for x in [next(iter(drawn.of(task)))["images"]]
        )

    assert far(8) < 0.8 * far(0)


def test_fits_that_begin_with_one_of_drawn_images_say_so(family, tmp_path):
    recipe = family.recipe("distill", **{**SMALL, "inner": METHOD}, iterations=1, shifts=0)
    fitted = fit(recipe, family.network, family.examples(4), tmp_path / "fit").fitted
    assert fitted is not None and fitted.words == "4 unlabelled a task of fit and procedural images, trained"


def test_errors_by_classes_are_those_of_the_tasks_heads(family, tmp_path):
    """Of an expert with two tasks, the drawn images count by the heads of both."""
    owners = {"e0": "e0", "e0 too": "e0", "e1": "e1"}
    examples = replace(no_examples(family), owners=owners)
    torch.manual_seed(0)
    heads = {task: torch.randn(3, 12) for task in owners}
    asked = []

    def logits(features: torch.Tensor, task: str) -> torch.Tensor:
        asked.append(task)
        return features @ heads[task].T

    network = replace(family.network, score=logits)
    merged = {}
    for errors in ("alike", "classes"):
        recipe = family.recipe(METHOD, **SMALL, errors=errors)
        merge(fit(recipe, network, examples, tmp_path / errors), tmp_path / f"{errors}.safetensors")
        merged[errors] = load_file(tmp_path / f"{errors}.safetensors")
        assert set(asked) == (set(owners) if errors == "classes" else set())
    assert any(not torch.equal(value, merged["classes"][name]) for name, value in merged["alike"].items())
