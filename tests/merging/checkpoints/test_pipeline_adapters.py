"""LoRA of a pipeline is merged into all components at once, as diffusers' `load_lora_weights` and `fuse_lora` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import refused
from pipelines import stable_diffusion
from safetensors.torch import save_file

from mergeline.merging import merge
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

diffusers = pytest.importorskip("diffusers")

State = dict[str, torch.Tensor]
RANK, ALPHA = 2, 3.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pipelines") / "base"
    stable_diffusion(0).save_pretrained(base)
    return base


def by_diffusers(module: str, component: str) -> str:
    return f"{component}.{module}"


def by_sd_scripts(module: str, component: str) -> str:
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + module.replace(".", "_")


def written(name: Callable[[str, str], str]) -> State:
    """Factors of the attention of the UNet and of the text encoder."""
    sides = ("lora_A", "lora_B") if name is by_diffusers else ("lora_down", "lora_up")
    torch.manual_seed(1)
    whole, state = stable_diffusion(0), State()
    for component, ends in (("unet", ("to_q", "to_v", "to_out.0")), ("text_encoder", ("q_proj", "out_proj"))):
        for module, layer in getattr(whole, component).named_modules():
            if module.endswith(ends):
                if component == "text_encoder" and not module.startswith("text_model."):
                    module = f"text_model.{module}"  # which files have, and transformers 5 in memory has not
                start = name(module, component)
                for side, shape in zip(sides, [(RANK, layer.in_features), (layer.out_features, RANK)]):
                    state[f"{start}.{side}.weight"] = torch.randn(shape) * 0.3
                if name is by_sd_scripts:
                    state[f"{start}.alpha"] = torch.tensor(ALPHA)
    return state


def fused(base: Path, file: Path) -> dict[str, State]:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {part: getattr(pipe, part).state_dict() for part in ("unet", "text_encoder", "vae")}


def opened(folder: Path) -> dict[str, State]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return {part: getattr(pipe, part).state_dict() for part in ("unet", "text_encoder", "vae")}


@pytest.mark.parametrize("name", [by_diffusers, by_sd_scripts])
def test_a_file_changes_all_components_as_diffusers_does(made, tmp_path, name):
    file = tmp_path / "lora.safetensors"
    save_file(written(name), file)
    recipe: dict[str, Any] = {"method": "average", "base": made, "experts": {"a": file}}
    plan = make_plan(recipe)
    assert "'a': lora.safetensors changes text_encoder, unet" in plan.warnings and not plan.problems
    merge(recipe, tmp_path / "out")
    before, expected, found = opened(made), fused(made, file), opened(tmp_path / "out")
    for part, tensors in expected.items():
        changed = [n for n, t in tensors.items() if not torch.equal(t, before[part][n])]
        assert bool(changed) == (part != "vae")
        for tensor_name, tensor in tensors.items():
            assert torch.allclose(found[part][tensor_name], tensor, rtol=1e-6, atol=1e-6), tensor_name
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_file_and_a_pipeline_are_merged_as_if_the_file_were_one(made, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(written(by_sd_scripts), file)
    merge({"method": "average", "base": made, "experts": {"a": file}, "dtype": "float32"}, tmp_path / "fused")
    stable_diffusion(2).save_pretrained(tmp_path / "b")
    for name, first in {"whole": tmp_path / "fused", "adapted": file}.items():
        recipe = {"method": "ties", "base": made, "experts": {"a": first, "b": tmp_path / "b"}}
        merge(recipe, tmp_path / name)
    whole, adapted = opened(tmp_path / "whole"), opened(tmp_path / "adapted")
    for part in whole:
        for name, tensor in whole[part].items():
            assert torch.allclose(adapted[part][name], tensor, atol=1e-6), name


def test_what_is_for_components_that_the_base_lacks_is_said_or_refused(made, tmp_path):
    file = tmp_path / "lora.safetensors"
    more = {f"text_encoder_2.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file({**written(by_diffusers), **more}, file)
    recipe = {"method": "average", "base": made, "experts": {"a": file}}
    assert (
        "'a': what lora.safetensors holds for text_encoder_2 is not merged: the base has none"
        in make_plan(recipe).warnings
    )
    save_file(more, file)
    with refused("is LoRA of text_encoder_2, and the base has text_encoder, unet, vae"):
        merge(recipe, tmp_path / "out")
    save_file({key: torch.ones(3, 3) for key in written(by_sd_scripts) if "alpha" not in key}, file)
    with refused("do not fit"):
        merge(recipe, tmp_path / "out")
    assert open_checkpoint(made) and not (tmp_path / "out").exists()
