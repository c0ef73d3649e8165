"""Tied weights leave no second output matrix; models of other architectures and formats are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file
from small_language_model import save_model

from mergeline.merging import merge
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.verify import verify

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(folder: Path) -> Path:
    """The checkpoint with its embedding written a second time, as the output matrix."""
    state = load_file(folder / "model.safetensors")
    save_file({**state, HEAD: state[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    for seed, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, seed)
    return {"base": tmp_path / "base", "experts": {"a": tmp_path / "a", "b": tmp_path / "b"}}


@pytest.mark.parametrize("whose", [["a"], ["base"], ["base", "a", "b"]])
def test_a_copy_of_a_tied_embedding_is_left_out(whose, family, tmp_path):
    expected = tmp_path / "expected"
    merge({"method": "average", **family}, expected)
    for name in whose:
        with_head(tmp_path / name)
    out = tmp_path / "out"
    merge({"method": "average", **family}, out)
    assert HEAD not in load_file(out / "model.safetensors")
    assert all(
        torch.equal(tensor, load_file(expected / "model.safetensors")[name])
        for name, tensor in load_file(out / "model.safetensors").items()
    )
    assert "bit-identical" in verify(out)


def test_an_output_matrix_of_its_own_stays(tmp_path):
    for seed, name in enumerate(("base", "a")):
        save_model(tmp_path / name, seed, tie_word_embeddings=False)
    merge(
        {"method": "average", "base": tmp_path / "base", "experts": {"a": tmp_path / "a"}}, tmp_path / "out"
    )
    assert HEAD in load_file(tmp_path / "out" / "model.safetensors")


def test_an_expert_whose_head_is_its_own_does_not_fit_a_tied_base(family, tmp_path):
    save_model(tmp_path / "a", 5, tie_word_embeddings=False)
    [problem] = make_plan({"method": "average", **family}).problems
    assert "the base lacks 1 tensor(s) of 'a'" in problem and HEAD in problem


def test_another_architecture_is_refused_by_name(family, tmp_path):
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "qwen2"}))
    [problem] = make_plan({"method": "average", **family}).problems
    assert "'b' is a qwen2 model, 'base' a llama" in problem
    config.write_text("[]")
    assert "is not a JSON object" in make_plan({"method": "average", **family}).problems[0]


def test_what_only_begins_like_gguf_is_refused(family, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with refused("x.gguf", "GGUF of version 0"):
        merge({"method": "average", "experts": {"a": tmp_path / "x.gguf"}}, tmp_path / "out")
