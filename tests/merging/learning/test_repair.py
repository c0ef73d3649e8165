"""`repair` gives the units of a merge the means and deviations that the experts' have."""

import json

import pytest
import torch
from checkpoints import refused
from learned_families import examples_of, learned_family
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.learning.fitting import fit
from mergeline.merging.learning.network import Network
from mergeline.merging.verify import verify


def outputs(family, checkpoint, x) -> dict[str, torch.Tensor]:
    """What each map with a bias gives, units last: (N, C)."""
    seen: dict[str, torch.Tensor] = {}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    parts = dict(family.network.module.named_modules())
    maps = {n: part for n, part in parts.items() if isinstance(part, kinds) and part.bias is not None}
    handles = [
        part.register_forward_hook(
            lambda part, _, out, name=name: seen.update(
                {name: out.movedim(1 if isinstance(part, torch.nn.Conv2d) else -1, -1).flatten(0, -2)}
            )
        )
        for name, part in maps.items()
    ]
    family.features(checkpoint, x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("inner", ("average", "task_arithmetic"))
def test_units_have_the_experts_means_and_deviations(tmp_path, inner):
    family = learned_family("timm", tmp_path / "family")
    recipe = family.recipe("repair", inner=inner)
    merge(fit(recipe, family.network, family.examples(12), tmp_path / "fit"), tmp_path / "out")
    # 24 images are one batch, so that what was set right in the fit is what they give again.
    x = torch.cat([family.inputs(0, 12), family.inputs(1, 12)])
    experts = [outputs(family, family.folder / name, x) for name in family.experts]
    merged = outputs(family, tmp_path / "out", x)
    assert merged and all("blocks.0.mlp.fc1" in seen for seen in (merged, *experts))
    for name, y in merged.items():
        means = torch.stack([seen[name].mean(0) for seen in experts]).mean(0)
        deviations = torch.stack([seen[name].std(0, correction=0) for seen in experts]).mean(0)
        assert torch.allclose(y.mean(0), means, atol=1e-4), name
        assert torch.allclose(y.std(0, correction=0), deviations, rtol=1e-3, atol=1e-4), name
    assert "bit-identical" in verify(tmp_path / "out")


def test_experts_that_are_the_same_stay_as_they_are(tmp_path):
    family = learned_family("timm", tmp_path / "family", noise=0.0)
    recipe = family.recipe("repair")
    merge(fit(recipe, family.network, family.examples(12), tmp_path / "fit"), tmp_path / "out")
    merged, base = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(family.folder / "base/model.safetensors"),
    )
    # Of one batch: what is set right has the statistics of each batch, the goal those of all.
    far = {n: float((merged[n] - value).abs().max()) for n, value in base.items()}
    assert max(far.values()) < 1e-4, far


def test_batch_norm_takes_its_statistics_from_the_same_pass(tmp_path):
    family = learned_family("resnet", tmp_path / "family")
    found = {}
    for method in ("repair", "reset_batch_norm"):
        fitted = fit(family.recipe(method), family.network, family.examples(20), tmp_path / method)
        merge(fitted, tmp_path / f"{method}-out")
        found[method] = load_file(tmp_path / f"{method}-out/model.safetensors")
    differ = {n for n, x in found["repair"].items() if not torch.equal(x, found["reset_batch_norm"][n])}
    assert differ == {"fc.weight", "fc.bias"}  # the one map that has a bias


def test_a_second_fit_gives_the_same_bytes(tmp_path):
    family = learned_family("timm", tmp_path / "family")
    for out in ("first", "second"):
        fit(family.recipe("repair"), family.network, family.examples(8), tmp_path / out)
    first, second = (tmp_path / out / "solved.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((tmp_path / "first/fit.json").read_text())["facts"]["method"] == "repair"


def test_models_that_have_nothing_to_set_right_are_refused(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4, bias=False)).eval()
    experts = {name: str(tmp_path / f"{name}.safetensors") for name in ("a", "b")}
    for path in [tmp_path / "base.safetensors", *experts.values()]:
        save_file({"1.weight": torch.randn(4, 12)}, path)
    recipe = {"method": "repair", "base": str(tmp_path / "base.safetensors"), "experts": experts}
    network = Network(module, lambda module, batch: module(batch["images"]))
    images = examples_of({name: torch.randn(3, 3, 2, 2) for name in experts})
    with refused("no map with a bias", "merge by average alone"):
        fit(recipe, network, images, tmp_path / "fit")
