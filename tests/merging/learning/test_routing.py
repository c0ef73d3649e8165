"""The router that is trained: what is written is the network that was, and it tells the tasks of examples apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import refused
from learned_families import LearnedFamily, examples_of, learned_family
from safetensors.torch import load_file

from mergeline.merging.checkpoints.router import Router, described, layer_inputs, read_router
from mergeline.merging.learning import routing
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Examples
from mergeline.merging.recipes.recipe import Recipe


@pytest.fixture
def family(tmp_path: Path) -> LearnedFamily:
    return learned_family("open_clip", tmp_path / "family")


def examples(family: LearnedFamily, count: int = 60) -> Examples:
    """Those of one expert are brighter."""
    return examples_of({name: family.inputs(t, count) + 2 * t for t, name in enumerate(family.experts)})


def fitted(family: LearnedFamily, folder: Path, given: Examples, **params: float) -> Recipe:
    return fit(family.recipe("routed_by_network", **params), family.network, given, folder)


def test_the_router_is_the_network_that_was_trained_and_finds_the_expert(family, tmp_path, monkeypatch):
    kept = []

    def folded(network: torch.nn.Sequential) -> dict[str, torch.Tensor]:
        kept.append(network)
        return real(network)

    real = routing._folded
    monkeypatch.setattr(routing, "_folded", folded)
    recipe = fitted(family, tmp_path / "fit", examples(family), epochs=20, rate=0.01)
    assert recipe.router is not None
    router: Router = read_router(recipe.router, family.experts)
    family.network.load(load_file(tmp_path / "family" / "base" / "model.safetensors"))
    for t in range(2):
        run = partial(family.network.features, {"images": family.inputs(7 + t, 40) + 2 * t})
        module = family.network.module
        with torch.no_grad():
            scores = router.scores(module, run)
            direct = kept[0](described(layer_inputs(module, router.layers, run)).float())
        torch.testing.assert_close(scores.float(), direct, rtol=1e-3, atol=1e-3)
        assert (scores.argmax(1) == t).double().mean() > 0.9


def test_the_same_seed_trains_the_same_router(family, tmp_path):
    before = torch.random.get_rng_state()
    files = [fitted(family, tmp_path / name, examples(family), epochs=2).router for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_few_examples_and_damaged_files_are_refused(family, tmp_path):
    with refused("'e0' has 9 examples, too few", "bring 10 or more"):
        fitted(family, tmp_path / "few", examples(family, 9))
    path = fitted(family, tmp_path / "fit", examples(family, 20), epochs=1).router
    other = tmp_path / "other.safetensors"
    state = load_file(path)
    other.write_bytes(path.read_bytes())
    with refused("chooses among e0, e1"):
        read_router(other, ["e0"])
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**state, "1/bias": state["1/bias"][:-1].clone()}, other, metadata)
    with refused("was damaged"):
        read_router(other, family.experts)
