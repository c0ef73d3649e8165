"""ProDistill: blocks are fitted one after the other, to what the experts' own blocks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from learned_families import learned_family
from safetensors.torch import load_file
from tiny_network import Family, make_family

from mergeline.merging import merge
from mergeline.merging.learning import blockwise
from mergeline.merging.learning.blockwise import Settings
from mergeline.merging.learning.fitting import fit

GRANULARITIES = ("taskwise", "layerwise", "elementwise")


def fitted(family: Family, folder: Path, **params: Any) -> Any:
    recipe = {**family.recipe, "method": "prodistill", "params": params}
    return fit(recipe, family.network, family.examples, folder)


def curve(folder: Path) -> dict[str, list[float]]:
    """The losses of each block."""
    found: dict[str, list[float]] = {}
    for row in json.loads((folder / "curve.json").read_text()):
        found.setdefault(row["block"], []).append(row["loss"])
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_blocks_loss_falls_and_the_engine_merges_the_result(tmp_path, granularity):
    family = make_family(tmp_path / "family", dtype=torch.float32)
    recipe = fitted(family, tmp_path / "job", granularity=granularity, epochs=20)
    losses = curve(tmp_path / "job")
    assert list(losses) == ["layers.0", "layers.1", "layers.2"]
    assert all(len(rows) == 20 and rows[-1] < rows[0] for rows in losses.values())
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in family.network.tensors().items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-5), name
    start = {name: base + sum(0.3 * (family.states[n][name] - base) for n in "abc")
             for name, base in family.states["base"].items()}  # fmt: skip
    assert torch.allclose(merged["gain"], start["gain"], atol=1e-6)  # of no block


def test_the_more_coefficients_there_are_the_nearer_the_blocks_come(tmp_path):
    last = {}
    for granularity in GRANULARITIES:
        family = make_family(tmp_path / "family", dtype=torch.float32)
        fitted(family, tmp_path / granularity, granularity=granularity, epochs=40)
        last[granularity] = curve(tmp_path / granularity)["layers.0"][-1]
    assert last["elementwise"] < 0.9 * last["layerwise"] and last["layerwise"] < last["taskwise"]


def test_one_expert_is_found_again(tmp_path):
    family = make_family(tmp_path / "family", experts=1, dtype=torch.float32, count=48)
    fitted(family, tmp_path / "job", epochs=300)
    for losses in curve(tmp_path / "job").values():
        assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("kind", ["open_clip", "bert"])
def test_blocks_of_real_architectures_are_fitted(kind, tmp_path):
    family = learned_family(kind, tmp_path / "family")
    recipe = family.recipe("prodistill", epochs=5)
    merged = fit(recipe, family.network, family.examples(20), tmp_path / "job")
    assert all(rows[-1] < rows[0] for rows in curve(tmp_path / "job").values())
    assert len(curve(tmp_path / "job")) == 2
    merge(merged, tmp_path / "out.safetensors")
    state = load_file(tmp_path / "out.safetensors")
    for name, tensor in family.network.tensors().items():
        if name in state:
            assert torch.allclose(state[name], tensor, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_derivatives_are_those_of_autograd_through_the_merge(granularity):
    """Of a quadratic loss of two tensors, three experts, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 3), "b": (4,)}

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).double()

    base = {name: drawn(shape) for name, shape in shapes.items()}
    taus = {name: [drawn(shape) for _ in range(3)] for name, shape in shapes.items()}
    x = drawn((7, 3))
    block = blockwise._Block(base, taus, Settings(granularity, 0.3, 0.1, 1, 1))
    own = {name: torch.zeros(shape).double().requires_grad_() for name, shape in shapes.items()}
    block.put(own)
    (x @ own["w"].T + own["b"]).square().sum().backward()
    block.pull(own)
    streamed = {
        name: number.grad.clone() for name, number in block.numbers.items() if number.grad is not None
    }
    for number in block.numbers.values():
        number.grad = None
    weights = {}
    for name in shapes:
        weights[name] = base[name] + sum(
            c * tau for c, tau in zip(block.numbers[block.key(name)], taus[name])
        )
        assert torch.allclose(weights[name], own[name], rtol=0, atol=1e-14)
    (x @ weights["w"].T + weights["b"]).square().sum().backward()
    assert streamed.keys() == block.numbers.keys()
    for name, number in block.numbers.items():
        assert number.grad is not None
        assert float((number.grad - streamed[name]).norm()) <= 1e-12 * float(number.grad.norm())


@pytest.mark.parametrize("granularity", ["layerwise", "elementwise"])
def test_a_block_that_was_finished_stays(tmp_path, monkeypatch, granularity):
    family = make_family(tmp_path / "family", dtype=torch.float32)
    params = {"granularity": granularity, "epochs": 4}
    fitted(family, tmp_path / "whole", **params)
    fit_block, seen = blockwise._Fit._fit, []

    def stopped(self: Any, stage: Any, *rest: Any) -> None:
        seen.append(stage.name)
        if seen == ["layers.0", "layers.1"]:
            raise KeyboardInterrupt
        fit_block(self, stage, *rest)

    monkeypatch.setattr(blockwise._Fit, "_fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        fitted(family, tmp_path / "job", **params)
    fitted(family, tmp_path / "job", **params)
    assert seen == ["layers.0", "layers.1", "layers.1", "layers.2"]
    [file] = [path.name for path in (tmp_path / "job").glob("*.safetensors")]
    for name in (file, "curve.json"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_loss_that_is_not_finite_stops_the_fit_and_keeps_the_blocks_before(tmp_path, monkeypatch):
    family = make_family(tmp_path / "family", dtype=torch.float32)
    run, broken = blockwise._Fit._backward, []

    def breaks(self: Any, stage: Any, epoch: int, task: str, stream: Any, target: Any) -> float:
        if stage.name == "layers.1" and epoch == 2:
            broken.append(task)
            target = target.moved(target.hidden * float("nan"))
        return run(self, stage, epoch, task, stream, target)

    monkeypatch.setattr(blockwise._Fit, "_backward", breaks)
    with refused("the loss of 'a' in 'layers.1' at epoch 2 is nan"):
        fitted(family, tmp_path / "job", epochs=4)
    assert broken == ["a"]
    [kept] = (tmp_path / "job" / "stages").glob("*.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())
    assert not (tmp_path / "job" / "fit.json").exists()
