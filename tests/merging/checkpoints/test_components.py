"""Pipelines of diffusers are merged whole, component by component, and open as they did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from junk import junked
from pipelines import pipeline_files, stable_diffusion
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.compress import compress
from mergeline.merging.describe import describe_family
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError
from mergeline.merging.export import export_task
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.transplant import transplant
from mergeline.merging.verify import verify
from mergeline.tasks import inspection

diffusers = pytest.importorskip("diffusers")

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for seed, name in enumerate(("base", "a", "b")):
        stable_diffusion(seed).save_pretrained(root / name)
    return root


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    for name in ("base", "a", "b"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def recipe(family: Path, **more: Any) -> dict[str, Any]:
    experts = {name: family / name for name in ("a", "b")}
    return {"method": "average", "base": family / "base", "experts": experts, **more}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_is_merged_whole_and_opens(family, tmp_path):
    out = tmp_path / "out"
    merge(recipe(family), out)
    assert files(family / "base") <= files(out) and files(out) - files(family / "base") == {
        "README.md",
        "manifest.json",
    }
    opened = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        states = [
            getattr(diffusers.DiffusionPipeline.from_pretrained(family / name), part).state_dict()
            for name in ("a", "b")
        ]
        for name, tensor in getattr(opened, part).state_dict().items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6), name
    assert "bit-identical" in verify(out) and "does not list" not in verify(out)
    merge(recipe(family), out)  # in place of its like


def test_tensors_are_described_by_their_own_component(family, tmp_path):
    rows = {row["tensor"]: row["treatment"] for row in make_plan(recipe(family, method="cart")).table()}
    assert rows["text_encoder/encoder.layers.0.mlp.fc1.weight"] == "matrix"
    assert rows["unet/down_blocks.0.resnets.0.conv1.weight"] == "matrix"
    merge(recipe(family, method="cart", shard_size=20_000), tmp_path / "out")
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").exists()
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(family / "base").tensors.keys()
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_component_alone_is_an_expert_of_the_pipeline(family, tmp_path):
    plan = make_plan({**recipe(family), "experts": {"a": family / "a/unet", "b": family / "b"}})
    assert "'a' is the component unet of the base" in plan.warnings
    assert "'a' has no text_encoder, no vae: it is as the base there" in plan.warnings
    merge(plan.recipe, tmp_path / "out")
    found, base, b = (
        load_file(folder / TEXT) for folder in (tmp_path / "out", family / "base", family / "b")
    )
    assert all(torch.allclose(found[name], (base[name] + b[name]) / 2, atol=1e-6) for name in found)
    found, a, b = (load_file(folder / UNET) for folder in (tmp_path / "out", family / "a", family / "b"))
    assert all(torch.allclose(found[name], (a[name] + b[name]) / 2, atol=1e-6) for name in found)


def test_what_no_expert_has_is_the_bases(family, tmp_path):
    merge({**recipe(family), "experts": {"a": family / "a/unet", "b": family / "b/unet"}}, tmp_path / "out")
    assert (tmp_path / "out" / TEXT).exists()
    found, base = (load_file(folder / TEXT) for folder in (tmp_path / "out", family / "base"))
    assert all(torch.allclose(found[name], base[name]) for name in base)


def test_a_model_of_diffusers_keeps_the_name_that_its_class_opens(family, tmp_path):
    merge(
        {**recipe(family), "base": family / "base/unet", "experts": {"a": family / "a/unet"}},
        tmp_path / "out",
    )
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")


def test_components_cannot_become_one_file(family, tmp_path):
    with refused("a model of several components makes several files; name a folder"):
        merge(recipe(family), tmp_path / "out.safetensors")


def test_damaged_pipelines_are_refused(family):
    listed = json.loads((family / "base/model_index.json").read_text())
    (family / "base/model_index.json").write_text(json.dumps({**listed, "../a": ["diffusers", "X"]}))
    assert "only plain file names inside the folder are allowed" in make_plan(recipe(family)).problems[0]
    (family / "base/model_index.json").write_text("[]")
    assert "model_index.json" in make_plan(recipe(family)).problems[0]
    (family / "base/model_index.json").write_text(json.dumps(listed))
    (family / "base" / UNET).rename(family / "base/unet/diffusion_pytorch_model.bin")
    assert "'unet/diffusion_pytorch_model.bin' is a pickle" in make_plan(recipe(family)).problems[0]


def test_code_and_terms_travel_and_what_does_not_is_named(tmp_path):
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_file(
            {"weight": torch.ones(2, 2)}, tmp_path / name / "model.safetensors", metadata={"author": "me"}
        )
    base = tmp_path / "base"
    (base / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_own.Own"}}))
    (base / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    for name in ("LICENSE.txt", "optimizer.pt", "training_log.csv"):
        (base / name).write_text(name)
    (base / "runs").mkdir()
    plan = make_plan({"method": "average", "base": base, "experts": {"a": tmp_path / "a"}})
    assert "not carried from 'base': runs/, training_log.csv" in plan.warnings
    merge(plan.recipe, tmp_path / "out")
    assert (tmp_path / "out/modeling_own.py").read_text() == "raise SystemExit('ran')\n"
    assert (tmp_path / "out/LICENSE.txt").exists() and not (tmp_path / "out/optimizer.pt").exists()
    assert open_checkpoint(tmp_path / "out").metadata["author"] == "me"
    (base / "config.json").write_text("{}")
    plan = make_plan({"method": "average", "base": base, "experts": {"a": tmp_path / "a"}})
    assert "not carried from 'base': modeling_own.py, runs/, training_log.csv" in plan.warnings


def test_each_component_is_dequantised_by_its_own_configuration(tmp_path):
    name, codes = "down_blocks.0.attn.to_q.weight", torch.randn(32, 32).clamp(-4, 4).to(torch.float8_e4m3fn)
    for folder in ("base", "a"):
        for file, body in pipeline_files(0, width=32).items():
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_bytes(body)
    unet = tmp_path / "a/unet"
    for file in unet.glob("diffusion*"):
        file.unlink()
    scales = {f"{name}_scale_inv": torch.full((2, 2), 0.5)}
    other = {"down_blocks.1.attn.to_q.weight": torch.ones(32, 32)}
    save_file({name: codes, **scales, **other}, unet / "diffusion_pytorch_model.safetensors")
    said_there = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = {"quantization_config": said_there}
    (unet / "config.json").write_text(json.dumps(config))
    plan = make_plan({**recipe(tmp_path), "experts": {"a": tmp_path / "a"}})
    assert not plan.problems
    said = f"a: unet: 1 tensors are quantised (1 of FP8 in blocks of 16 x 16; 'unet/{name}' first)"
    assert any(warning.startswith(said) for warning in plan.warnings)
    merge(plan.recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / UNET)
    assert torch.equal(found[name], codes.float() * 0.5)
    assert "quantization_config" not in (tmp_path / "out/unet/config.json").read_text()
    config = {"quantization_config": {**said_there, "quant_method": "gptq"}}
    (unet / "config.json").write_text(json.dumps(config))
    assert "says that it is quantised by gptq" in make_plan(plan.recipe).problems[0]


def test_a_pipeline_is_described_component_by_component(family):
    found = inspection.describe(family / "base")
    parts = found["components"]
    assert parts.keys() == {"unet", "vae", "text_encoder"}
    assert sum(part["tensors"] for part in parts.values()) == found["tensors"]
    assert sum(part["bytes"] for part in parts.values()) == found["bytes"]
    assert inspection.describe(family / "base/unet")["components"] == {}
    layers = {row["layer"]: row for row in describe_family(family / "base", {"a": family / "a"})["layers"]}
    assert {"unet/down_blocks.0", "vae/outside blocks", "unet/outside blocks"} <= layers.keys()
    assert sum(row["tensors"] for row in layers.values()) == found["tensors"]
    differing = inspection.differences(family / "base", family / "a")["differences"]
    assert {row["tensor"].partition("/")[0] for row in differing} == parts.keys()


def test_a_task_of_a_pipeline_is_exported_as_one(family, tmp_path):
    merge(recipe(family, heads=["unet/conv_out.*"]), tmp_path / "merged")
    export_task(tmp_path / "merged", "a", tmp_path / "out")
    found, own = load_file(tmp_path / "out" / UNET), load_file(family / "a" / UNET)
    assert torch.equal(found["conv_out.weight"], own["conv_out.weight"])
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert "bit-identical" in verify(tmp_path / "out")


def test_what_is_of_one_model_is_refused_of_a_pipeline(family, tmp_path):
    one = {"method": "average", "base": family / "base", "experts": {"a": family / "a"}}
    with refused("the base is a pipeline (text_encoder, unet, vae)"):
        extract_lora(one, tmp_path / "out", rank=2)
    extract_lora(one, tmp_path / "factors.safetensors", rank=2)
    assert not make_plan({**one, "experts": {"a": tmp_path / "factors.safetensors"}}).problems
    with refused("several components (text_encoder, unet, vae), and a store is of one"):
        compress(recipe(family, method="tall_mask"), tmp_path / "store")
    with refused("is of several components"):
        transplant(family / "base", family / "a", tmp_path / "out")


def test_what_lists_components_is_read_or_refused(family):
    file = family / "base/model_index.json"
    for i, (_, _, changed) in enumerate(junked(json.loads(file.read_text()))):
        if i % 3 == 0:
            file.write_text(json.dumps(changed))
            try:
                open_checkpoint(family / "base")
            except UserError as error:
                assert "\n" not in str(error)
