"""Units are matched by what they do on examples."""

from __future__ import annotations

import json
import re

import pytest
import torch
from checkpoints import refused
from learned_families import examples_of
from model_zoo import build
from safetensors.torch import load_file, save_file
from torch import nn

from mergeline.merging.align import align, family_of
from mergeline.merging.architecture import on_disk
from mergeline.merging.learning.activation_matching import collect_activations
from mergeline.merging.learning.network import Network
from mergeline.merging.permutations.groups import random_order, reordered
from mergeline.merging.verify import verify


def pair(name, folder, seed=1):
    """A model of the zoo in `a`, the same in another order in `b`; its network, and inputs."""
    torch.manual_seed(seed)
    model = build(name).requires_grad_(False)
    model.save_pretrained(folder / "a")
    state = load_file(folder / "a/model.safetensors")
    for key, t in state.items():
        if t.is_floating_point():
            t += torch.randn_like(t) / 3 + 2.0 * key.endswith("running_var")
    save_file(state, folder / "a/model.safetensors", {"format": "pt"})
    family = family_of(folder / "a", {"b": folder / "a"})
    generator = torch.Generator().manual_seed(1)
    moved = reordered(state, family.groups, {g.name: random_order(g, generator) for g in family.groups})
    (folder / "b").mkdir()
    (folder / "b/config.json").write_bytes((folder / "a/config.json").read_bytes())
    save_file({k: t.contiguous() for k, t in moved.items()}, folder / "b/model.safetensors", {"format": "pt"})
    texts = name in ("llama", "gpt2", "bert")

    def run(module: nn.Module, batch) -> torch.Tensor:
        found = module(input_ids=batch["images"]) if texts else module(batch["images"])
        return found.logits.flatten(0, -2)

    config = json.loads((folder / "a/config.json").read_text())
    names = {
        memory: stored
        for memory, [stored] in on_disk(load_file(folder / "a/model.safetensors"), config).items()
    }
    size = 32 if name == "resnet_hf" else 8
    inputs = torch.randint(3, 40, (40, 6)) if texts else torch.randn(40, 3, size, size)
    return Network(model, run, names=names), examples_of({"task": inputs}, size=16)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "resnet_hf"])
def test_a_reordered_model_is_found_again_by_its_activations(name, tmp_path):
    network, examples = pair(name, tmp_path)
    file = collect_activations(
        tmp_path / "a", tmp_path / "b", network, examples, tmp_path / "seen.safetensors"
    )
    made = align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out", statistics=file)
    assert made["b"]["aligned"]["method"] == "activation_matching"
    a, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "out"))
    assert all(torch.equal(a[key], found[key]) for key in a)
    assert "bit-identical" in verify(tmp_path / "out")


def _weights(module: nn.Module):
    return [(f"{name}.weight", part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def test_correlations_are_of_all_batches(tmp_path):
    network, examples = pair("vit", tmp_path)
    file = collect_activations(
        tmp_path / "a", tmp_path / "a", network, examples, tmp_path / "seen.safetensors"
    )
    found = load_file(file)
    [key] = [key for key in found if re.search(r"layer\.0\..*hidden/units$", key)]
    stored = {network.stored(name): part for name, part in _weights(network.module)}
    up, down = (
        next(part for name, part in stored.items() if re.search(rf"layer\.0\.{where}\.dense\.weight$", name))
        for where in ("intermediate", "output")
    )
    seen: dict[str, list[torch.Tensor]] = {"read": [], "given": []}
    network.load(load_file(tmp_path / "a/model.safetensors"))
    handles = [
        down.register_forward_hook(lambda _, inputs, __: seen["read"].append(inputs[0].flatten(0, -2))),
        up.register_forward_hook(lambda _, __, outputs: seen["given"].append(outputs.flatten(0, -2))),
    ]
    with torch.no_grad():
        for batch in examples.of("task"):
            network.features(batch)
    for handle in handles:
        handle.remove()
    expected = sum(torch.corrcoef(torch.cat(rows).T) for rows in seen.values()) / 2
    torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-4)


def test_statistics_of_other_models_are_refused(tmp_path):
    network, examples = pair("vit", tmp_path)
    file = tmp_path / "seen.safetensors"
    save_file({"x": torch.zeros(2, 2)}, file)
    with refused("is no file of activations", "--force"):
        collect_activations(tmp_path / "a", tmp_path / "b", network, examples, file)
    with refused("has nothing on"):
        align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out", statistics=file)
    assert not (tmp_path / "out").exists()
