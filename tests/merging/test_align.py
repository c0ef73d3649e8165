"""Checkpoints that are aligned: what the real libraries make of them, what is said of them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from model_zoo import build, run_on
from safetensors.torch import load_file, save_file

from mergeline.flows.cli import main
from mergeline.merging import merge
from mergeline.merging.align import align, family_of
from mergeline.merging.permutations.groups import random_order, reordered
from mergeline.merging.verify import verify


def save(name: str, folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = build(name)
    model.save_pretrained(folder)
    return model


def moved_copy(folder: Path, out: Path, seed: int, noise: float = 0.0) -> None:
    """The model of a folder in another order, with a little noise."""
    family = family_of(folder, {"same": folder})
    generator = torch.Generator().manual_seed(seed)
    orders = {group.name: random_order(group, generator) for group in family.groups}
    state = reordered(load_file(folder / "model.safetensors"), family.groups, orders)
    out.mkdir()
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    noisy = {
        key: (
            t + noise * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        ).contiguous()
        for key, t in state.items()
    }
    save_file(noisy, out / "model.safetensors", {"format": "pt"})


def load(name: str, folder: Path) -> Any:
    return type(build(name, "meta")).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["llama", "clip", "bert", "resnet_hf"])
def test_transformers_computes_the_same_with_an_aligned_model(name, tmp_path):
    save(name, tmp_path / "a", 0)
    other = save(name, tmp_path / "b", 1)
    made = align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out")["b"]
    told = made["aligned"]
    assert told["distance"]["after"] < told["distance"]["before"]
    assert sum(group["moved"] for group in told["groups"].values()) > 0
    with torch.no_grad():
        torch.testing.assert_close(
            run_on(name, load(name, tmp_path / "out")), run_on(name, other), rtol=1e-5, atol=1e-5
        )
    assert "bit-identical" in verify(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "Aligned by weight_matching" in card and made["output"]["digest"] in card


def test_a_merge_of_a_model_and_its_reordered_self_is_that_model(tmp_path, capsys):
    """Also what the command says, and that the reference is left out of what is written."""
    save("llama", tmp_path / "a", 0)
    moved_copy(tmp_path / "a", tmp_path / "b", seed=1)
    assert main(["align", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"),
                 "--singular-vectors"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "heads: " in said and "hidden: " in said and "of 16 units moved, in 1 group" in said
    assert "after" in said and "distance to the reference:" in said and ", 0 after" in said
    assert "1.000 after" in said
    merge({"method": "average", "experts": {"a": tmp_path / "a", "b": tmp_path / "out"}}, tmp_path / "merge")
    a, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "merge"))
    assert all(torch.equal(a[key], merged[key]) for key in a)


def test_many_models_are_written_in_the_order_of_the_reference(tmp_path):
    save("vit", tmp_path / "a", 0)
    for number, name in enumerate(("b", "c")):
        moved_copy(tmp_path / "a", tmp_path / name, seed=number, noise=1e-3)
    made = align(tmp_path / "a", {n: tmp_path / n for n in ("b", "c")}, tmp_path / "out", seed=3)
    a = load_file(tmp_path / "a/model.safetensors")
    for name in ("b", "c"):
        assert made[name]["aligned"]["method"] == "merge_many"
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        assert max(float((found[key] - a[key]).abs().max()) for key in a) < 0.01
        assert "bit-identical" in verify(tmp_path / "out" / name)


def test_bytes_do_not_change_and_bfloat16_stays(tmp_path):
    save("llama", tmp_path / "a", 0)
    moved_copy(tmp_path / "a", tmp_path / "b", seed=1)
    for name in ("a", "b"):
        file = tmp_path / name / "model.safetensors"
        save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file, {"format": "pt"})
    align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out")
    a, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "out"))
    assert all(found[key].dtype == torch.bfloat16 and torch.equal(a[key], found[key]) for key in a)


def test_heads_of_other_classes_move_and_say_nothing(tmp_path):
    save("vit", tmp_path / "a", 0)
    moved_copy(tmp_path / "a", tmp_path / "b", seed=1)
    file = tmp_path / "b/model.safetensors"
    state = load_file(file)
    head = torch.cat([state["classifier.weight"], state["classifier.weight"]])
    save_file(
        {**state, "classifier.weight": head, "classifier.bias": torch.zeros(len(head))},
        file,
        {"format": "pt"},
    )
    align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out")
    a, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "out"))
    assert torch.equal(found["classifier.weight"][:2], a["classifier.weight"])
    assert all(torch.equal(a[key], found[key]) for key in a if not key.startswith("classifier"))


def test_what_is_left_stays(tmp_path):
    save("llama", tmp_path / "a", 0)
    save("llama", tmp_path / "b", 1)
    made = align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out", leave=["residual", "hidden"])
    told = made["b"]["aligned"]
    assert {name.rpartition(".")[2] for name in told["groups"]} == {"heads"}
    b, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("b", "out"))
    for key in told["kept"]:
        assert torch.equal(b[key], found[key])
    assert "model.layers.0.mlp.up_proj.weight" in told["kept"]


def test_what_cannot_be_aligned_is_refused_and_nothing_is_written(tmp_path):
    a, b, out = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "out.safetensors"))
    save_file({"x.weight": torch.zeros(3, 3)}, a)
    save_file({"x.weight": torch.zeros(3, 3)}, b)
    with refused("not known what may be permuted", "docs/permutations.md"):
        align(a, {"b": b}, out)
    save_file({"y.weight": torch.zeros(3, 3)}, b)
    with refused("lacks the tensor 'x.weight'"):
        align(a, {"b": b}, out)
    save("llama", tmp_path / "llama", 0)
    with refused("leave 'hiden'", "hidden"):
        align(tmp_path / "llama", {"b": tmp_path / "llama"}, tmp_path / "out", leave=["hiden"])
    with refused("several models are written"):
        align(a, {"b": b, "c": b}, out)
    with refused("is no name of a folder"):
        align(a, {"../b": b}, out)
    with refused("holds the input"):
        align(tmp_path / "llama", {"b": tmp_path / "llama"}, tmp_path / "llama")
    with refused("memory"):
        align(tmp_path / "llama", {"b": tmp_path / "llama"}, tmp_path / "out", memory=1000)
    assert not out.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "known"), [("gpt2", True), ("llama", False)])
def test_the_number_of_heads_can_be_told(name, known, tmp_path):
    """Of a bare file; where heads share keys, how many do is not known, and they stay."""
    save(name, tmp_path / "a", 0)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((tmp_path / "a/model.safetensors").read_bytes())
    found = {group.name.rpartition(".")[2] for group in family_of(bare, {"b": bare}, 4).groups}
    assert "heads" not in {g.name.rpartition(".")[2] for g in family_of(bare, {"b": bare}).groups}
    assert ("heads" in found) == known


def test_a_damaged_output_is_not_verified(tmp_path):
    save("vit", tmp_path / "a", 0)
    moved_copy(tmp_path / "a", tmp_path / "b", seed=1)
    align(tmp_path / "a", {"b": tmp_path / "b"}, tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    told = json.loads(manifest.read_text())
    told["aligned"]["distance"]["after"] = 1.0
    manifest.write_text(json.dumps(told))
    with refused("out"):
        verify(tmp_path / "out")
