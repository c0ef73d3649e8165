"""BatchNorm's statistics of a merge are those that examples have in it."""

import torch
from checkpoints import refused
from learned_families import learned_family
from safetensors.torch import load_file

from mergeline.merging import merge
from mergeline.merging.learning.fitting import fit
from mergeline.merging.verify import verify


def test_every_layer_has_the_statistics_of_what_reaches_it(tmp_path):
    family = learned_family("resnet", tmp_path / "family")
    fitted = fit(
        family.recipe("reset_batch_norm", inner="task_arithmetic", scale=0.5), family.network, family.examples(20),
        tmp_path / "fit",
    )  # fmt: skip
    merge(fitted, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    merge(family.recipe("task_arithmetic", scale=0.5), tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")
    running = {name for name in merged if name.endswith(("running_mean", "running_var"))}
    assert running and all(torch.equal(merged[n], plain[n]) for n in merged if n not in running)

    # In train mode, each layer normalises by the very batch: all of both tasks together.
    network = family.network
    network.load(plain)
    seen: dict[str, torch.Tensor] = {}
    for name, layer in network.module.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.train()
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        network.features({"images": torch.cat([family.inputs(0, 20), family.inputs(1, 20)])})
    for name, x in seen.items():
        assert torch.allclose(merged[f"{name}.running_mean"], x.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(merged[f"{name}.running_var"], x.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert "bit-identical" in verify(tmp_path / "out")


def test_models_without_batch_norm_are_refused(tmp_path):
    family = learned_family("timm", tmp_path / "family")
    with refused("have no BatchNorm", "merge by average alone"):
        fit(family.recipe("reset_batch_norm"), family.network, family.examples(4), tmp_path / "fit")


def test_what_least_squares_solved_for_stays_beside_the_new_statistics(tmp_path):
    family = learned_family("resnet", tmp_path / "family")
    recipe = family.recipe("reset_batch_norm", inner="progressive_least_squares")
    fitted = fit(recipe, family.network, family.examples(20), tmp_path / "fit")
    merge(fitted, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    solved = load_file(tmp_path / "fit/solved.safetensors")
    assert "layer1.0.conv1.weight" in solved and "layer1.0.bn1.running_mean" in solved
    assert all(torch.equal(merged[name], tensor) for name, tensor in solved.items())
