"""Language models that cannot be merged: exit code 2, one line that says why, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_language_model import TOKENS, save_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    state = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / WEIGHTS)


def packed(folder: Path, method: str, weight: str | None, *beside: str) -> None:
    """One matrix as `method` stores it: packed integers, of a dtype that is none of floats, and what unpacks them."""
    name = PROJECTION.removesuffix(".weight")
    new = {f"{name}.{part}": torch.ones(4) for part in beside}
    packed = {PROJECTION: None, f"{name}.{weight or 'weight'}": torch.ones(4, dtype=torch.uint8)}
    edit_weights(folder, {**packed, **new})
    edit_json(folder / CONFIG, quantization_config={"quant_method": method})


def lora(folder: Path, base_name: str, width: int = 32) -> None:
    """The folder becomes an adapter of rank 2 for the first query projection of a model of that width."""
    shutil.rmtree(folder)
    folder.mkdir()
    name = f"base_model.model.{PROJECTION.removesuffix('.weight')}"
    factors = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base_name}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def more_tokens(folder: Path) -> None:
    save_model(folder, 2, tokens=[*TOKENS, "more"])
    (folder / "tokenizer.json").unlink()


def a_missing_shard(folder: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": {name: shard for name in load_file(folder / WEIGHTS)}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def gguf_alone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))


def pickle_alone(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


# What is done to the expert `bad`, and what the line must say.
BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "another vocabulary without a tokenizer": (
        more_tokens,
        [f"'bad' {len(TOKENS) + 1} rows", "it has no tokenizer.json", "put it beside the weights"],
    ),
    "a missing shard": (
        a_missing_shard,
        ["'model-00002-of-00002.safetensors', which is missing", "download it again"],
    ),
    "another model type": (
        lambda folder: edit_json(folder / CONFIG, model_type="qwen2"),
        ["'bad' is a qwen2 model, 'base' a llama", "one architecture"],
    ),
    "another width": (lambda folder: save_model(folder, 2, hidden_size=16), ["shape", "'bad'", "'base'"]),
    "more layers": (
        lambda folder: save_model(folder, 2, num_hidden_layers=3),
        ["base lacks 9 tensor(s) of 'bad'"],
    ),
    "fewer layers": (lambda folder: save_model(folder, 2, num_hidden_layers=1), ["'bad' lacks 9 tensor(s)"]),
    "other names": (
        lambda folder: edit_weights(folder, {PROJECTION: None, "transformer.h.0.attn.weight": torch.ones(2)}),
        ["'bad' lacks 1 tensor(s) that others have", PROJECTION],
    ),
    "bitsandbytes in 4 bits": (
        lambda folder: packed(folder, "bitsandbytes", None, "weight.absmax", "weight.quant_map"),
        ["bad: is quantised", "weight.absmax", "merge the float16 or wider model"],
    ),
    "bitsandbytes in 8 bits": (
        lambda folder: packed(folder, "bitsandbytes", None, "SCB"),
        ["is quantised", "SCB"],
    ),
    "GPTQ": (
        lambda folder: packed(folder, "gptq", "qweight", "qzeros", "scales"),
        ["is quantised", "qweight"],
    ),
    "AWQ": (lambda folder: packed(folder, "awq", "qweight", "qzeros", "scales"), ["is quantised", "qweight"]),
    "HQQ": (
        lambda folder: packed(folder, "hqq", "W_q", "scale", "zero"),
        ["is quantised", "hqq in config.json"],
    ),
    "GGUF": (gguf_alone, ["model.Q4_K_M.gguf", "GGUF of version 0", "convert it again"]),
    "a pickle": (pickle_alone, ["pytorch_model.bin", "a pickle checkpoint", "--allow-pickle"]),
    "an adapter of another base, by name": (
        lambda folder: lora(folder, "org/other"),
        ["adapter_config.json", "was trained on 'org/other', the base is 'org/base'", "name that base"],
    ),
    "an adapter of another base, by shape": (
        lambda folder: lora(folder, "org/base", width=64),
        ["the adapter does not fit the base", "[2, 64]", "of shape [32, 32]", "'org/base'"],
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, good/ and bad/, three of one kind; the base is known to be org/base on the hub."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "good", "bad")):
        save_model(folder / name, seed)
    (folder / "base" / "provenance.json").write_text('{"source": "hf://org/base@main"}')
    return folder


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_merged_is_refused_in_one_line(kind, models, mergeline, tmp_path):
    spoil, parts = BAD[kind]
    shutil.copytree(models, tmp_path / "in")
    spoil(tmp_path / "in" / "bad")
    given = ["--method", "ties", "--base", tmp_path / "in" / "base"]
    for name in ("good", "bad"):
        given += ["--expert", f"{name}={tmp_path / 'in' / name}"]
    found = mergeline("merge", *given, "--out", tmp_path / "out")
    assert found.code == 2 and found.out == ""
    assert found.err.startswith("mergeline: ") and found.err.count("\n") == 1 and found.err.endswith("\n")
    assert all(part in found.err for part in parts), found.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["org/base", "Org/Base", "../base", "/models/base", None])
def test_an_adapter_whose_base_may_be_this_one(name, models, mergeline, tmp_path):
    shutil.copytree(models, tmp_path / "in")
    lora(tmp_path / "in" / "bad", name)
    given = ["--base", tmp_path / "in" / "base", "--expert", tmp_path / "in" / "bad"]
    assert mergeline("merge", "--method", "average", *given, "--out", tmp_path / "out").code == 0


def test_weights_that_were_dequantised_are_merged(models, mergeline, tmp_path):
    """Their configuration may still say what they once were."""
    shutil.copytree(models, tmp_path / "in")
    edit_json(tmp_path / "in" / "good" / CONFIG, quantization_config={"quant_method": "gptq"})
    given = ["--base", tmp_path / "in" / "base", "--expert", tmp_path / "in" / "good"]
    assert mergeline("merge", "--method", "average", *given, "--out", tmp_path / "out").code == 0
