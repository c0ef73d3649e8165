"""SMILE: each map adds by the published formula, wherever in a model it is; files of other models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

import pytest
import torch
from checkpoints import refused
from learned_families import LearnedFamily, learned_family
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.task_adapters import task_adapters
from mergeline.merging.checkpoints.upscaling import Upscaled
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.upscaling import triplets


def made(family: LearnedFamily, folder: Path, **params: int) -> Upscaled:
    recipe = fit(
        family.recipe("smile_upscaling", **params), family.network, family.examples(0), folder / "fit"
    )
    merge(recipe, folder / "merged")
    return Upscaled(files(folder))


def files(folder: Path) -> dict[str, Mapping[str, torch.Tensor]]:
    return {task: adapter.tensors for task, adapter in task_adapters(folder / "merged").items()}


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_triplets_are_the_leading_ones(shape):
    tau = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    down, up = triplets(tau, 3)
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(up.norm(dim=0), s[:3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_a_map_adds_what_the_formula_says(tmp_path):
    """SmileMoELinear of tanganke/fusion_bench: softmax over the gates' norms, the top ones, renormalised."""
    family = learned_family("open_clip", tmp_path / "family", experts=3)
    k, gate, top = 4, 2, 2
    upscaled = made(family, tmp_path, k=k, gate_k=gate, top_k=top)
    name = "transformer.resblocks.0.mlp.c_fc"
    states = {n: load_file(tmp_path / "family" / n / "model.safetensors") for n in ("base", *family.experts)}
    x = torch.randn(5, 7, states["base"][f"visual.{name}.weight"].shape[1])
    factors = []
    for expert in family.experts:
        tau, bias = (
            states[expert][f"visual.{name}.{p}"] - states["base"][f"visual.{name}.{p}"]
            for p in ("weight", "bias")
        )
        u, s, v = torch.linalg.svd(tau.double(), full_matrices=False)
        factors.append((u[:, :k] * s[:k], v[:k], bias.double()))
    expected = torch.zeros(5, 7, len(factors[0][2]), dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            token = x[i, j].double()
            g = torch.stack([(v[:gate] @ token).norm() for _, v, _ in factors]).softmax(0)
            best = g.argsort(descending=True)[:top].tolist()
            for e in best:
                us, v, bias = factors[e]
                expected[i, j] += g[e] / g[best].sum() * (us @ (v @ token) + bias)
    chosen = torch.zeros(3, dtype=torch.int64)
    found = upscaled._maps[f"{name}.weight/0"].added(x, gate, top, chosen)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert int(chosen.sum()) == 35


def test_one_expert_at_full_rank_gives_back_its_linear_maps(tmp_path):
    """Those of modules and of attention, packed or not; and the model is left as it was."""
    family = learned_family("open_clip", tmp_path / "family", experts=1, everything=False)
    upscaled = made(family, tmp_path, k=1000)
    module, x = family.network.module, family.inputs(0, 3)
    base, expert = (family.features(tmp_path / "family" / name, x) for name in ("base", family.experts[0]))
    family.network.load(load_file(tmp_path / "merged" / "model.safetensors"))
    batch = {"images": x}
    with torch.no_grad():
        torch.testing.assert_close(family.network.features(batch), base, rtol=0, atol=0)
        state = load_file(tmp_path / "family" / family.experts[0] / "model.safetensors")
        own = load_file(tmp_path / "family" / "base" / "model.safetensors")
        blocks = {n: t for n, t in state.items() if "resblocks" in n}
        family.network.load({**own, **blocks})
        expected = family.network.features(batch)
        family.network.load(own)
        with upscaled.inside(module) as chosen:
            found = family.network.features(batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, base, atol=1e-3) and int(chosen[0]) > 0
        torch.testing.assert_close(family.network.features(batch), base, rtol=0, atol=0)
    assert expert.shape == found.shape


def test_what_does_not_belong_together_is_refused(tmp_path):
    family = learned_family("open_clip", tmp_path / "family", experts=2)
    made(family, tmp_path / "a", k=4)
    made(family, tmp_path / "b", k=5)
    a, b = (files(tmp_path / place) for place in "ab")
    with refused("different models or settings"):
        Upscaled({"e0": a["e0"], "e1": b["e1"]})
    with refused("the model has no part 'transformer.resblocks"), Upscaled(a).inside(torch.nn.Linear(2, 2)):
        pass
    bert = learned_family("resnet", tmp_path / "resnet", experts=2)
    bert.network.module.fc = torch.nn.Identity()
    with refused("no linear maps"):
        made(bert, tmp_path / "c")
