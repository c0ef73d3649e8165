"""LoRA of a pipeline is merged into all components at once, as diffusers' `load_lora_weights` and `fuse_lora` do.

PEFT's adapters are merged into the components that they are for, as `merge_and_unload` does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import refused
from model_zoo import build
from pipelines import stable_diffusion
from safetensors.torch import load_file, save_file

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


# ------------------------------------------------------------------------------------------ PEFT's adapters

TARGETS = {"unet": ["to_q", "to_v", "to_out.0", "conv1"], "text_encoder": ["q_proj", "out_proj"]}


def save_peft(folder: Path, component: str, kind: str = "LoraConfig", seed: int = 1, **config: Any) -> State:
    """An adapter of a component of the pipeline with random weights; what PEFT makes of the two."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    made = getattr(peft, kind)(r=RANK, target_modules=TARGETS[component], **config)
    adapted = peft.get_peft_model(getattr(stable_diffusion(0), component), made)
    with torch.no_grad():
        for value in (value for value in adapted.parameters() if value.requires_grad):
            value.copy_(torch.randn_like(value) * 0.3)
    adapted.save_pretrained(folder)
    return {name: value.clone() for name, value in adapted.merge_and_unload().state_dict().items()}


def check(found: dict[str, State], before: dict[str, State], changed: dict[str, State]) -> None:
    """Components are what PEFT made of them, and all others as before."""
    for part, tensors in before.items():
        expected = changed.get(part, tensors)
        assert tensors.keys() == expected.keys() == found[part].keys()
        assert (part in changed) != all(torch.equal(tensors[name], value) for name, value in expected.items())
        for name, value in expected.items():
            assert torch.allclose(found[part][name], value, rtol=1e-6, atol=1e-6), f"{part}/{name}"


@pytest.mark.parametrize(
    ("component", "kind"), [("unet", "LoraConfig"), ("unet", "LoHaConfig"), ("text_encoder", "LoraConfig")]
)
def test_an_adapter_of_peft_changes_its_component_alone(made, tmp_path, component, kind):
    expected = save_peft(tmp_path / "lora", component, kind)
    recipe: dict[str, Any] = {"method": "average", "base": made, "experts": {"a": tmp_path / "lora"}}
    plan = make_plan(recipe)
    assert f"'a': the adapter lora changes {component}" in plan.read_as and not plan.problems
    merge(recipe, tmp_path / "out")
    check(opened(tmp_path / "out"), opened(made), {component: expected})
    assert "bit-identical" in verify(tmp_path / "out")


def test_adapters_of_several_components_are_one_expert(made, tmp_path):
    expected = {part: save_peft(tmp_path / "lora" / part, part) for part in TARGETS}
    recipe: dict[str, Any] = {"method": "average", "base": made, "experts": {"a": tmp_path / "lora"}}
    said = ["'a': the adapter text_encoder changes text_encoder", "'a': the adapter unet changes unet"]
    assert [line for line in make_plan(recipe).read_as if line.startswith("'a'")] == said
    merge(recipe, tmp_path / "out")
    check(opened(tmp_path / "out"), opened(made), expected)
    assert "bit-identical" in verify(tmp_path / "out")
    with refused("lora: holds adapters of text_encoder, unet: name their pipeline as base"):
        merge({**recipe, "base": made / "unet"}, tmp_path / "no")
    with refused("'a' is an adapter: name the base that it adds to"):
        merge({"method": "average", "experts": {"a": tmp_path / "lora"}}, tmp_path / "no")


def test_adapters_files_and_pipelines_are_experts_together(made, tmp_path):
    adapted = save_peft(tmp_path / "lora", "unet")
    save_file(written(by_diffusers), tmp_path / "lora.safetensors")
    stable_diffusion(2).save_pretrained(tmp_path / "whole")
    experts = {"a": tmp_path / "lora", "b": tmp_path / "lora.safetensors", "c": tmp_path / "whole"}
    merge({"method": "average", "base": made, "experts": experts}, tmp_path / "out")
    before, found, whole = opened(made), opened(tmp_path / "out"), opened(tmp_path / "whole")
    of_file = fused(made, tmp_path / "lora.safetensors")
    for part, tensors in before.items():
        for name in tensors:
            first = adapted[name] if part == "unet" else tensors[name]
            expected = (first + of_file[part][name] + whole[part][name]) / 3
            assert torch.allclose(found[part][name], expected, atol=1e-5), f"{part}/{name}"


@pytest.mark.parametrize("renamed", ["base", "adapter"])
def test_names_of_text_encoders_of_older_transformers_are_known(made, tmp_path, renamed):
    expected = save_peft(tmp_path / "lora", "text_encoder")
    shutil.copytree(made, tmp_path / "base")
    file, before = tmp_path / "base" / "text_encoder" / "model.safetensors", ""
    if renamed == "adapter":
        file, before = tmp_path / "lora" / "adapter_model.safetensors", "base_model.model."
    state = {
        before + "text_model." + key.removeprefix(before): value for key, value in load_file(file).items()
    }
    save_file(state, file, metadata={"format": "pt"})
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    merge(recipe, tmp_path / "out")
    check(opened(tmp_path / "out"), opened(made), {"text_encoder": expected})


def test_of_components_that_are_alike_the_folder_says_which(made, tmp_path):
    expected = save_peft(tmp_path / "lora", "text_encoder")
    shutil.copytree(made, tmp_path / "base")
    shutil.copytree(made / "text_encoder", tmp_path / "base" / "text_encoder_2")
    index = tmp_path / "base" / "model_index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({**listed, "text_encoder_2": listed["text_encoder"]}))
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "lora"}}
    with refused(
        "fits text_encoder and text_encoder_2 of the base; call its folder as the one that it is for"
    ):
        merge(recipe, tmp_path / "out")
    shutil.copytree(tmp_path / "lora", tmp_path / "text_encoder_2")
    merge({**recipe, "experts": {"a": tmp_path / "text_encoder_2"}}, tmp_path / "out")
    [first, second] = [
        load_file(tmp_path / "out" / part / "model.safetensors")
        for part in ("text_encoder", "text_encoder_2")
    ]
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(second[name], expected[name], atol=1e-6)
    assert torch.equal(first[name], load_file(made / "text_encoder" / "model.safetensors")[name])


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_an_adapter_of_a_transformer_changes_it(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base, model = tmp_path / "base", build(kind)
    model.save_pretrained(base / "transformer")
    (base / "model_index.json").write_text('{"transformer": ["diffusers", "X"]}')
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["to_q", "to_out.0"]))
    with torch.no_grad():
        for value in (value for value in adapted.parameters() if value.requires_grad):
            value.copy_(torch.randn_like(value) * 0.3)
    adapted.save_pretrained(tmp_path / "lora")
    merge({"method": "average", "base": base, "experts": {"a": tmp_path / "lora"}}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = adapted.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-6) for name, value in expected.items())


def test_an_adapter_that_names_another_pipeline_is_refused(made, tmp_path):
    save_peft(tmp_path / "unet", "unet")
    shutil.copytree(made, tmp_path / "base")
    (tmp_path / "base" / "provenance.json").write_text('{"source": "hf://org/pipe"}')
    recipe = {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "unet"}}
    config = tmp_path / "unet" / "adapter_config.json"
    said = json.loads(config.read_text())
    for named, problems in (("org/pipe", 0), (None, 0), ("org/other", 1)):
        config.write_text(json.dumps({**said, "base_model_name_or_path": named}))
        assert len(make_plan(recipe).problems) == problems
    with refused("the adapter was trained on 'org/other', the base is 'org/pipe'"):
        merge(recipe, tmp_path / "out")


def test_adapters_that_fit_no_component_are_refused_in_one_line(made, tmp_path):
    save_peft(tmp_path / "unet", "unet")
    recipe = {"method": "average", "base": made, "experts": {"a": tmp_path / "unet"}}
    config, weights = (tmp_path / "unet" / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    state = load_file(weights)
    save_file({name.replace("lora_A", "lora_C"): value for name, value in state.items()}, weights)
    with refused("unet/adapter_config.json: the adapter does not fit the base"):
        merge(recipe, tmp_path / "out")
    save_file(state, weights)
    said = json.loads(config.read_text())
    (tmp_path / "both" / "transformer").mkdir(parents=True)
    shutil.copytree(tmp_path / "unet", tmp_path / "both" / "transformer", dirs_exist_ok=True)
    with refused("is an adapter of transformer, and the base has text_encoder, unet, vae"):
        merge({**recipe, "experts": {"a": tmp_path / "both"}}, tmp_path / "out")
    shutil.move(tmp_path / "unet", tmp_path / "other")
    recipe["experts"] = {"a": tmp_path / "other"}
    save_file(
        {name.replace("down_blocks", "down"): value for name, value in state.items()},
        tmp_path / "other" / weights.name,
    )
    (tmp_path / "other" / config.name).write_text(json.dumps({**said, "auto_mapping": None}))
    with refused("the adapter fits none of text_encoder, unet, vae; name the base that it was trained on"):
        merge(recipe, tmp_path / "out")
    (tmp_path / "other" / config.name).write_text(json.dumps({**said, "peft_type": "BOFT"}))
    with refused("the adapter is of type BOFT"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_of_a_text_encoder_is_not_untied_within_a_pipeline(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    base = tmp_path / "base"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(base / "text_encoder")
    (base / "model_index.json").write_text('{"text_encoder": ["transformers", "LlamaForCausalLM"]}')
    recipe = {"method": "average", "base": base, "experts": {"a": tmp_path / "lora"}}
    for saved, said in (
        (None, None),
        (["embed_tokens"], "text_encoder values of its own, and they are one there"),
    ):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
        problems = make_plan(recipe).problems
        assert len(problems) == (saved is not None) and all(said in problem for problem in problems)
