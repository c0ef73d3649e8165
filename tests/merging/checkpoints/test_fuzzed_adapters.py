"""Adapters that are damaged: planned and merged, or refused in one line, without a traceback or a hang."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_adapters import llama, mixtral, peft, save_any
from safetensors.torch import load_file, save_file
from soon import soon

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.errors import UserError

pytestmark = pytest.mark.slow
CASES = 200  # of each kind of adapter
PATIENCE = 20  # seconds
LINEAR = ["q_proj", "down_proj"]
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "LoRA": (llama, "Lora", {"target_modules": LINEAR, "use_dora": True, "trainable_token_indices": [1, 3]}),
    "LoHa": (llama, "LoHa", {"target_modules": LINEAR, "r": 2}),
    "LoKr": (llama, "LoKr", {"target_modules": LINEAR, "r": 1, "decompose_both": True}),
    "IA3": (llama, "IA3", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}),
    "OFT": (llama, "OFT", {"target_modules": LINEAR, "oft_block_size": 4, "coft": True}),
    "VeRA": (llama, "Vera", {"target_modules": LINEAR, "r": 3}),
    "HRA": (llama, "HRA", {"target_modules": LINEAR, "r": 2}),
    "experts": (mixtral, "Lora", {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}),
}
NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 5, 1e-300, 1e39, 2**31, 2**63, 10**400, float("nan"), float("inf"), True]
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(["q_proj", "(", ".*", "lm_head"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "a", "("]), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
SAID = st.dictionaries(st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern"]), JUNK).map(
    json.dumps
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 40]), max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])


@cache
def original(kind: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model, config, values = KINDS[kind]
    model().save_pretrained(folder / kind / "base")
    save_any(model(), folder / kind / "lora", getattr(peft, f"{config}Config")(**values))
    lora = folder / kind / "lora"
    return json.loads((lora / "adapter_config.json").read_text()), load_file(
        lora / "adapter_model.safetensors"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def changed_tensors(data: st.DataObject, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some of other shapes, dtypes or names, or away."""
    found = dict(tensors)
    for name in data.draw(st.lists(st.sampled_from(sorted(found)), max_size=3, unique=True)):
        value = found.pop(name)
        match data.draw(st.sampled_from(["shape", "dtype", "name", "away", "nan"])):
            case "shape":
                found[name] = torch.ones(data.draw(SHAPES))
            case "dtype":
                found[name] = value.to(data.draw(DTYPES))
            case "name":
                end = data.draw(st.sampled_from([".x", "", ".lora_A.weight", ".base_layer.weight", ".bias"]))
                found[name.rpartition(".")[0] + end] = value
            case "nan":
                found[name] = value * float("nan")
    return found


def merged_or_refused(recipe: dict[str, Any], out: Path) -> None:
    with soon(PATIENCE):
        try:
            make_plan(recipe)
            merge(recipe, out)
        except UserError as error:
            assert "\n" not in str(error)
            return
        out.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_adapter_is_merged_or_refused_in_one_line(kind, folder):
    config, tensors = original(kind, folder)
    keys = sorted(
        {*config, "alora_invocation_tokens", "rank_pattern", "alpha_pattern", "token_indices", "alpha", "eps"}
    )

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        values = dict(config)
        for key in data.draw(st.lists(st.sampled_from(keys), max_size=2)):
            values[key] = data.draw(JUNK)
        lora, out = folder / kind / "lora", folder / kind / "out.safetensors"
        (lora / "adapter_config.json").write_text(json.dumps(values))
        save_file(changed_tensors(data, tensors) or tensors, lora / "adapter_model.safetensors")
        recipe = {"method": "average", "base": folder / kind / "base", "experts": {"a": lora}}
        merged_or_refused(recipe, out)

    damaged()


OF_FILES: dict[str, dict[str, list[int]]] = {  # parts of a layer (8, 4), and of a convolution (8, 4, 3, 3)
    "lora": {"lora_down.weight": [2, 4], "lora_up.weight": [8, 2]},
    "loha": {f"hada_w{i}_{side}": shape for i in "12" for side, shape in (("a", [8, 2]), ("b", [2, 4]))},
    "lokr": {"lokr_w1_a": [2, 2], "lokr_w1_b": [2, 2], "lokr_w2": [4, 2]},
    "lora of a convolution": {"lora_down.weight": [2, 4, 3, 3], "lora_up.weight": [8, 2, 1, 1]},
    "loha of a convolution": {
        f"hada_{part}{i}{side}": shape
        for i in "12"
        for part, side, shape in (("w", "_a", [2, 8]), ("w", "_b", [2, 4]), ("t", "", [2, 2, 3, 3]))
    },
    "lokr of a convolution": {
        "lokr_w1": [2, 2], "lokr_w2_a": [2, 4], "lokr_w2_b": [2, 2], "lokr_t2": [2, 2, 3, 3],
    },
    "lora_mid of a convolution": {
        "lora_down.weight": [2, 4, 1, 1], "lora_up.weight": [8, 2, 1, 1], "lora_mid.weight": [2, 2, 3, 3],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_FILES)
def test_a_damaged_file_of_a_pipeline_is_merged_or_refused_in_one_line(kind, folder):
    base = folder / kind / "unet"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file(
        {"mid_block.a.weight": torch.ones(8, 4), "conv_in.weight": torch.ones(8, 4, 3, 3)},
        base / "x.safetensors",
    )
    layer = "lora_unet_conv_in" if "convolution" in kind else "lora_unet_mid_block_a"
    tensors = {f"{layer}.{part}": torch.ones(shape) for part, shape in OF_FILES[kind].items()}
    tensors[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / "lora.safetensors")
    merge(
        {"method": "average", "base": base, "experts": {"a": folder / "lora.safetensors"}}, folder / "whole"
    )

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        file, out = folder / "lora.safetensors", folder / "out.safetensors"
        said = data.draw(st.none() | st.text(max_size=5) | SAID)
        metadata = {} if said is None else {"lora_adapter_metadata": said}
        save_file(changed_tensors(data, tensors) or tensors, file, metadata)
        recipe = {"method": "average", "base": base, "experts": {"a": file}}
        merged_or_refused(recipe, out)

    damaged()


PROMPTS = {
    "ctx": torch.randn(3, 4, 8), "token_prefix": torch.ones(3, 1, 8), "token_suffix": torch.ones(3, 2, 8),
    "vpt_embeddings": torch.randn(1, 4, 8), "vpt_embeddings_deep": torch.randn(2, 4, 8),
}  # fmt: skip


def test_damaged_prompts_are_merged_or_refused_in_one_line(folder):
    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        files = {name: folder / f"{name}.safetensors" for name in ("a", "b")}
        for file in files.values():
            save_file(changed_tensors(data, PROMPTS) or PROMPTS, file)
        merged_or_refused({"method": "average", "experts": files}, folder / "out.safetensors")

    damaged()


@pytest.mark.parametrize("with_base", [True, False])
def test_damaged_singular_values_are_merged_or_refused_in_one_line(folder, with_base):
    base, lora = folder / "svfit", folder / "values"
    llama().save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    tensors = {f"base_model.model.{module}.svfit_values": torch.ones(3) for module in modules}
    hashes = {m: blake3(weights[f"{m}.weight"].numpy().tobytes()).hexdigest() for m in modules}
    config = {"peft_type": "SVFIT", "base_digests": {m: f"blake3:{hashes[m]}" for m in modules}}
    for name in ("a", "b"):
        (lora / name).mkdir(parents=True, exist_ok=True)

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        for place in (lora / "a", lora / "b"):
            values: dict[str, Any] = dict(config)
            for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=1)):
                values[key] = data.draw(JUNK)
            (place / "adapter_config.json").write_text(json.dumps(values))
            save_file(changed_tensors(data, tensors) or tensors, place / "adapter_model.safetensors")
        recipe: dict[str, Any] = {"method": "average", "experts": {"a": lora / "a", "b": lora / "b"}}
        merged_or_refused({**recipe, **({"base": base} if with_base else {})}, folder / "out.safetensors")

    damaged()


def test_a_damaged_adapter_in_a_pipeline_is_merged_or_refused_in_one_line(folder):
    config, tensors = original("LoRA", folder)
    base, lora = folder / "pipeline", folder / "adapters" / "text_encoder"
    base.mkdir()
    shutil.copytree(folder / "LoRA" / "base", base / "text_encoder")
    shutil.copytree(folder / "LoRA" / "base", base / "transformer")
    listed = {part: ["transformers", "LlamaForCausalLM"] for part in ("text_encoder", "transformer")}
    (base / "model_index.json").write_text(json.dumps(listed))
    lora.mkdir(parents=True)

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        values = dict(config)
        for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
            values[key] = data.draw(JUNK)
        (lora / "adapter_config.json").write_text(json.dumps(values))
        save_file(changed_tensors(data, tensors) or tensors, lora / "adapter_model.safetensors")
        expert = data.draw(st.sampled_from([lora, lora.parent]))
        recipe = {"method": "average", "base": base, "experts": {"a": expert}}
        with soon(PATIENCE):
            try:
                make_plan(recipe).check()
            except UserError as error:
                assert "\n" not in str(error)

    damaged()
