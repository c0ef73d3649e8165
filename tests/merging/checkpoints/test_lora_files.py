"""LoRA of diffusion models as single files: what diffusers fuses into the same component, to 1e-6."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import pytest
import torch
from checkpoints import refused
from model_zoo import build
from peft_adapters import transformers
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.architecture.diffusion import LayerNames
from mergeline.merging.engine.planning import make_plan

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import (  # noqa: E402
    FluxLoraLoaderMixin,
    SD3LoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)

State = dict[str, torch.Tensor]


def unet() -> Any:
    """A UNet with the parts of SDXL's."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=2, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16,
    )  # fmt: skip


def zoo(name: str) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return build(name)

    return make


def layers(model: Any, part: str = "") -> dict[str, torch.Tensor]:
    """The weights of linear layers and convolutions, by module."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, kinds) and part in n}


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, ...) and B (M, R, 1 ...)."""
    ones = [1] * (weight.dim() - 2)
    return torch.randn(rank, *weight.shape[1:]) * 0.2, torch.randn(len(weight), rank, *ones) * 0.2


def written(
    model: Any, name: Callable[[str], str], part: str = "", sides: tuple[str, str] = ("lora_down", "lora_up"),
    alpha: Sequence[float] = (),
) -> State:  # fmt: skip
    """A file with factors of every layer, of different ranks."""
    torch.manual_seed(1)
    state: State = {}
    for i, (module, weight) in enumerate(layers(model, part).items()):
        rank = 2 + i % 2
        for side, value in zip(sides, factors(weight, rank)):
            state[f"{name(module)}.{side}.weight"] = value
        if alpha:
            state[f"{name(module)}.alpha"] = torch.tensor(alpha[i % len(alpha)])
    return state


def merged(base: Path, state: State, folder: Path, metadata: Mapping[str, str] | None = None) -> State:
    save_file(state, folder / "lora.safetensors", dict(metadata or {}))
    merge(
        {"method": "average", "base": base, "experts": {"a": folder / "lora.safetensors"}},
        folder / "out.safetensors",
    )
    return load_file(folder / "out.safetensors")


def same(found: State, expected: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6), name


def fused(model: Any) -> State:
    model.fuse_lora()
    model.unload_lora()
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_diffusers(model: Any, state: State) -> State:
    """What diffusers makes of a UNet and a file of sd-scripts."""
    found, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(state), unet_config=model.config)
    StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(found, alphas, model)
    return fused(model)


def stability(module: str) -> str:
    """The module's name in Stability's code, by the table that is under test: diffusers reads it back."""
    from mergeline.merging.architecture.diffusion import _stability

    found = list(_stability(module, 2))
    return "lora_unet_" + (found[-1] if found else module.replace(".", "_"))


@pytest.mark.parametrize("name", [stability, lambda module: "lora_unet_" + module.replace(".", "_")])
def test_sd_scripts_and_a_unet(name, tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    state = written(unet(), name, "_block", alpha=[1.5])
    assert len({key for key in state if "alpha" in key}) > 100
    expected, before = by_diffusers(unet(), state), unet().state_dict()
    found = merged(tmp_path / "unet", state, tmp_path)
    assert sum(not torch.equal(found[n], before[n]) for n in found) == len(layers(unet(), "_block"))
    same(found, expected, before)


def test_each_layer_has_its_own_alpha(tmp_path):
    """diffusers 0.42 gives layers of attention the most frequent one, so the formula of sd-scripts is the reference."""
    unet().save_pretrained(tmp_path / "unet")
    state = written(unet(), stability, "_block", alpha=[1.5, 2.5, 3.5])
    found = merged(tmp_path / "unet", state, tmp_path)
    for module, weight in layers(unet(), "_block").items():
        down, up, alpha = (
            state[f"{stability(module)}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        added = (alpha / len(down) * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        assert torch.allclose(found[f"{module}.weight"], weight + added, atol=1e-6), module


def test_layers_outside_of_blocks_have_stabilitys_names():
    names = LayerNames(layers(unet()))
    known = {
        "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
    }  # fmt: skip
    assert {name: names.find(name) for name in known} == {name: (module,) for name, module in known.items()}


@pytest.mark.parametrize("metadata", [False, True])
def test_diffusers_own_names(metadata, tmp_path):
    """Metadata say alpha and rank; without them the product is added as it is."""
    unet().save_pretrained(tmp_path / "unet")
    state = written(unet(), lambda module: f"unet.{module}", "attn", ("lora_A", "lora_B"))
    said = {
        "unet.r": 2, "unet.lora_alpha": 7, "unet.use_rslora": False, "unet.alpha_pattern": {"attn1.to_k": 3},
        "text_encoder.r": 4,
    }  # fmt: skip
    found = merged(
        tmp_path / "unet", state, tmp_path, {"lora_adapter_metadata": json.dumps(said)} if metadata else None
    )
    before = unet().state_dict()
    for module, weight in layers(unet(), "attn").items():
        down, up = (state[f"unet.{module}.lora_{side}.weight"] for side in "AB")
        alpha = 3 if module.endswith("attn1.to_k") else 7
        scale = alpha / len(down) if metadata else 1.0
        assert torch.allclose(found[f"{module}.weight"], weight + scale * up @ down, atol=1e-6), module
    if not metadata:
        model = unet()
        StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(dict(state), None, model)
        same(found, fused(model), before)


def test_names_of_older_diffusers(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    state = {}
    for key, value in written(unet(), lambda m: m, "attn1.to_q", ("down", "up")).items():
        state["unet." + key.replace("attn1.to_q.", "attn1.processor.to_q_lora.")] = value
    found, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(state), unet_config=unet().config)
    model = unet()
    StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(found, alphas, model)
    same(merged(tmp_path / "unet", state, tmp_path), fused(model), unet().state_dict())


@pytest.mark.parametrize(("name", "loader"), [("sd3", SD3LoraLoaderMixin), ("flux", FluxLoraLoaderMixin)])
def test_transformers_of_sd3_and_flux(name, loader, tmp_path):
    make = zoo(name)
    make().save_pretrained(tmp_path / "transformer")
    state = written(make(), lambda m: f"transformer.{m}", "attn", ("lora_A", "lora_B"))
    model = make()
    if name == "sd3":
        loader.load_lora_into_transformer(dict(state), model)
    else:
        loader.load_lora_into_transformer(dict(state), None, model)
    same(merged(tmp_path / "transformer", state, tmp_path), fused(model), make().state_dict())


def test_sd_scripts_and_flux_whose_queries_keys_and_values_are_one(tmp_path):
    make = zoo("flux")
    make().save_pretrained(tmp_path / "transformer")
    torch.manual_seed(1)
    width = 16
    outputs = {
        "double_blocks_0_img_attn_qkv": 3 * width, "double_blocks_0_txt_attn_qkv": 3 * width,
        "double_blocks_0_img_attn_proj": width, "double_blocks_0_txt_attn_proj": width,
        "double_blocks_0_img_mod_lin": 6 * width, "double_blocks_0_txt_mod_lin": 6 * width,
        "double_blocks_0_img_mlp_0": 4 * width, "double_blocks_0_txt_mlp_0": 4 * width,
        "single_blocks_0_modulation_lin": 3 * width,
    }  # fmt: skip
    inputs = {
        "double_blocks_0_img_mlp_2": 4 * width,
        "double_blocks_0_txt_mlp_2": 4 * width,
        "single_blocks_0_linear2": 5 * width,
    }
    state: State = {}
    for name in (*outputs, *inputs):
        down, up = factors(torch.empty(outputs.get(name, width), inputs.get(name, width)), 3)
        state |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    model = make()
    found, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(state), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(found, alphas, model)
    same(merged(tmp_path / "transformer", state, tmp_path), fused(model), make().state_dict())
    # diffusers knows the widths of the published model alone for this one
    down, up = factors(torch.empty(7 * width, width), 3)
    one = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": down,
        "lora_unet_single_blocks_0_linear1.lora_up.weight": up,
    }
    ours, before = merged(tmp_path / "transformer", one, tmp_path), make().state_dict()
    start = 0
    for module in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        name = f"single_transformer_blocks.0.{module}.weight"
        rows = len(before[name])
        assert torch.allclose(ours[name], before[name] + up[start : start + rows] @ down, atol=1e-6)
        start += rows
    assert start == 7 * width


def text_encoder() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, vocab_size=40))


def test_a_text_encoder_and_parts_for_other_components(tmp_path):
    text_encoder().save_pretrained(tmp_path / "text_encoder")
    before = load_file(tmp_path / "text_encoder" / "model.safetensors")
    module = "text_model.encoder.layers.1.self_attn.q_proj"
    name = next(n for n in before if n.endswith("layers.1.self_attn.q_proj.weight"))
    down, up = factors(before[name], 2)
    theirs = {"lora_unet_a.lora_down.weight": down.clone(), "lora_unet_a.lora_up.weight": up.clone()}
    for state in (
        {
            f"lora_te1_{module.replace('.', '_')}.lora_down.weight": down,
            f"lora_te1_{module.replace('.', '_')}.lora_up.weight": up,
        },
        {f"text_encoder.{module}.lora_A.weight": down, f"text_encoder.{module}.lora_B.weight": up},
        {
            "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight": down,
            "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.up.weight": up,
        },
    ):
        found = merged(tmp_path / "text_encoder", {**state, **theirs}, tmp_path)
        assert torch.allclose(found[name], before[name] + up @ down, atol=1e-6)
        assert [n for n in found if not torch.equal(found[n], before[n])] == [name]
        (tmp_path / "out.safetensors").unlink()
    plan = make_plan(
        {
            "method": "average",
            "base": tmp_path / "text_encoder",
            "experts": {"a": tmp_path / "lora.safetensors"},
        }
    )
    assert any("2 tensors of lora.safetensors are for unet, not merged here" in w for w in plan.warnings)


def test_dora_of_sd_scripts(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    weights = layers(unet(), "mid_block.attentions.0.proj_in")
    [(module, weight)] = weights.items()
    down, up = factors(weight, 2)
    start = f"lora_unet_{module.replace('.', '_')}"
    scale = torch.rand(len(weight), 1) + 0.5
    state = {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up, f"{start}.dora_scale": scale}
    found = merged(tmp_path / "unet", state, tmp_path)[f"{module}.weight"]
    whole = weight + up @ down
    assert torch.allclose(found, scale * whole / whole.norm(dim=1, keepdim=True), atol=1e-6)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.3


def loha(shape: Sequence[int], core: bool) -> tuple[State, torch.Tensor]:
    """Parts of rank 2 as LyCORIS saves them, and their product; core: with one of the kernel's size."""
    rows, columns, *kernel = shape
    state, product = State(), torch.ones(())
    for i in "12":
        if core:
            left, right, middle = draw(2, rows), draw(2, columns), draw(2, 2, *kernel)
            state |= {f"hada_w{i}_a": left, f"hada_w{i}_b": right, f"hada_t{i}": middle}
            product = product * torch.einsum("ij...,jr,ip->pr...", middle, right, left)
        else:
            left, right = draw(rows, 2), draw(2, columns * math.prod(kernel))
            state |= {f"hada_w{i}_a": left, f"hada_w{i}_b": right}
            product = product * (left @ right).reshape(shape)
    return state, product / 2


def lokr(shape: Sequence[int], outer: bool, inner: str) -> tuple[State, torch.Tensor]:
    """The same of rank 2; outer: whether the outer matrix has factors, inner: "whole", "factors" or "core"."""
    rows, columns, *kernel = shape
    ones = [1] * len(kernel)
    state: State = {}
    if outer:
        state |= {"lokr_w1_a": draw(2, 2), "lokr_w1_b": draw(2, 4)}
        first = state["lokr_w1_a"] @ state["lokr_w1_b"]
    else:
        first = state["lokr_w1"] = draw(2, 4)
    size = (rows // 2, columns // 4)
    match inner:
        case "whole":
            second = state["lokr_w2"] = draw(*size, *kernel)
        case "factors":
            state |= {"lokr_w2_a": draw(size[0], 2), "lokr_w2_b": draw(2, size[1] * math.prod(kernel))}
            second = (state["lokr_w2_a"] @ state["lokr_w2_b"]).reshape(*size, *kernel)
        case _:
            state |= {
                "lokr_w2_a": draw(2, size[0]),
                "lokr_w2_b": draw(2, size[1]),
                "lokr_t2": draw(2, 2, *kernel),
            }
            parts = (state[f"lokr_{part}"] for part in ("t2", "w2_b", "w2_a"))
            second = torch.einsum("ij...,jr,ip->pr...", *parts)
    has_rank = outer or inner != "whole"
    return state, torch.kron(first.reshape(2, 4, *ones), second.contiguous()) / (2 if has_rank else 1)


def tucker(shape: Sequence[int]) -> tuple[State, torch.Tensor]:
    rows, columns, *kernel = shape
    down, up, middle = draw(2, columns, 1, 1), draw(rows, 2, 1, 1), draw(2, 2, *kernel)
    product = torch.einsum("ij...,jr,pi->pr...", middle, down.flatten(1), up.flatten(1)) / 2
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": middle}, product


LYCORIS = {
    "loha": lambda shape: loha(shape, core=False),
    "loha with cores": lambda shape: loha(shape, core=len(shape) > 2),
    "lokr": lambda shape: lokr(shape, outer=False, inner="factors"),
    "lokr of four factors": lambda shape: lokr(shape, outer=True, inner="factors"),
    "lokr with cores": lambda shape: lokr(shape, outer=False, inner="core" if len(shape) > 2 else "factors"),
    "lokr, outer factors": lambda shape: lokr(shape, outer=True, inner="whole"),
    "lokr, whole": lambda shape: lokr(shape, outer=False, inner="whole"),
    "lora with cores": lambda shape: tucker(shape) if len(shape) > 2 else loha(shape, core=False),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_is_what_its_formulas_make_of_linear_layers_and_convolutions(kind, tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    torch.manual_seed(1)
    weights = layers(unet(), "up_blocks.0")
    state, expected = State(), {}
    for i, (module, weight) in enumerate(weights.items()):
        parts, product = LYCORIS[kind](weight.shape)
        start = f"lora_unet_{module.replace('.', '_')}"
        state |= {f"{start}.{part}": value.contiguous() for part, value in parts.items()}
        state[f"{start}.alpha"] = torch.tensor(1.0 + i % 2)
        expected[f"{module}.weight"] = weight + product * (1.0 if kind == "lokr, whole" else 1.0 + i % 2)
    found, before = merged(tmp_path / "unet", state, tmp_path), unet().state_dict()
    assert {len(weight.shape) for weight in weights.values()} == {2, 4}
    for name, value in found.items():
        assert torch.allclose(value, expected.get(name, before[name]), atol=1e-5), name


def test_lycoris_of_flux_whose_queries_keys_and_values_are_one(tmp_path):
    make = zoo("flux")
    make().save_pretrained(tmp_path / "transformer")
    torch.manual_seed(1)
    width = 16
    parts, product = loha((3 * width, width), core=False)
    state = {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": value for part, value in parts.items()}
    found, before = merged(tmp_path / "transformer", state, tmp_path), make().state_dict()
    for i, layer in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer_blocks.0.attn.{layer}.weight"
        assert torch.allclose(found[name], before[name] + product[i * width :][:width] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (8, 2)}, ["not of one kind"]),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight": (2, 2)}, ["does not fit the base", "[2, 2]"]),
        ({"lora_unet_mid_block_attentions_0_proj_in.diff": (16, 16)}, ["diff", "no part of LoRA"]),
        ({"lora_unet_conv_in.hada_w1_a": (8, 2)}, ["'conv_in'", "lacks a part of LoHa"]),
        ({"lora_unet_conv_in.lokr_w1": (2, 2), "lora_unet_conv_in.lokr_w2": (3, 2)}, ["does not fit the base"]),
        (
            {f"lora_unet_conv_in.lokr_{part}": (2, 2) for part in ("w1", "w2")}
            | {"lora_unet_conv_in.dora_scale": (8, 1)},
            ["norms of its own"],
        ),
        (
            {"lora_unet_nowhere.lora_down.weight": (2, 8), "lora_unet_nowhere.lora_up.weight": (8, 2)},
            ["'nowhere'", "no layer"],
        ),
        ({"lora_unet_conv_in.lora_down.weight": (2, 8)}, ["'conv_in'", "lacks one of its factors"]),
        (
            {"lora_unet_conv_in.lora_down.weight": (2, 8), "lora_unet_conv_in.lora_up.weight": (8, 2)},
            ["do not fit", "conv_in"],
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(change, parts, tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    good = {
        f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight": torch.ones(16, 16)
        for side in ("up", "down")
    }
    with refused("a: ", *parts):
        merged(
            tmp_path / "unet", {**good, **{key: torch.ones(shape) for key, shape in change.items()}}, tmp_path
        )


def test_what_has_no_base_or_another_component(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    text_encoder().save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "lora.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2), "unet.a.lora_B.weight": torch.ones(2, 2)}, file)
    recipe = {"method": "average", "experts": {"a": file}}
    with refused("or the folder of one component"):
        merge(recipe, tmp_path / "out")
    with refused("holds nothing for text_encoder, but for unet"):
        merge({**recipe, "base": tmp_path / "text_encoder"}, tmp_path / "out")
    (tmp_path / "unet" / "config.json").unlink()
    with refused("does not say which it is"):
        merge({**recipe, "base": (tmp_path / "unet").rename(tmp_path / "other")}, tmp_path / "out")
