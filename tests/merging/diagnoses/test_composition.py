"""What attention heads pass on to one another: scores, and circuits that an average loses."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, refused
from faulty_families import Taus, save, told, unrelated
from torch import Tensor

from mergeline.merging.describe import describe_family
from mergeline.merging.diagnoses.heads import KINDS, Layer, composition
from mergeline.merging.engine.mergelock import Attention, Part

LAYERS, HEADS, GROUPS, WIDTH, E = 3, 4, 2, 32, 8


def llama(folder: Path) -> State:
    """A base with grouped queries, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    random = torch.Generator().manual_seed(0)
    base = {}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        for part, rows in (("q", HEADS * E), ("k", GROUPS * E), ("v", GROUPS * E), ("o", WIDTH)):
            columns = HEADS * E if part == "o" else WIDTH
            base[f"{prefix}self_attn.{part}_proj.weight"] = torch.randn(rows, columns, generator=random)
        base[f"{prefix}input_layernorm.weight"] = torch.rand(WIDTH, generator=random) + 0.5
    return base


def circuit(taus: Taus, expert: str) -> None:
    """Head 1 of layer 0 writes into a direction that heads 2 and 3 of layer 2 read as a key, loudly."""
    random = torch.Generator().manual_seed(7)
    channel = torch.nn.functional.normalize(torch.randn(WIDTH, generator=random), dim=0)
    write, read = (torch.randn(E, generator=random) for _ in range(2))
    taus[expert]["model.layers.0.self_attn.o_proj.weight"][:, E : 2 * E] += 8 * torch.outer(channel, write)
    taus[expert]["model.layers.2.self_attn.k_proj.weight"][E : 2 * E] += 8 * torch.outer(read, channel)


def described(folder: Path, planted: str = "", composition: bool = True) -> dict[str, Any]:
    base = llama(folder)
    taus = unrelated("abcd", base)
    if planted:
        circuit(taus, planted)
    family = save(folder, base, taus)
    return describe_family(**family, ranks=(1.0,), workers=1, composition=composition)["diagnoses"]


def test_an_average_of_like_heads_loses_no_circuit(tmp_path):
    found = described(tmp_path)
    assert found["advice"] == []
    [tower] = found["composition"].values()
    assert all(own["largest"] < 0.1 for own in tower["experts"].values())
    assert tower["by_chance"] == pytest.approx(WIDTH**-0.5, rel=1e-5)


def test_a_circuit_that_the_average_loses_is_named(tmp_path):
    found = described(tmp_path, "c")
    [advice] = [advice for advice in found["advice"] if advice["diagnosis"] == "composition"]
    assert advice["experts"] == ["c"] and advice["layers"] == (0, 2)
    assert "from head 1 of layer 0 to the keys of head" in advice["sentence"]
    [tower] = found["composition"].values()
    drift = tower["experts"]["c"]
    assert drift["writer"] == [0, 1] and drift["reader"] in ([2, 2], [2, 3]) and drift["kind"] == "key"
    assert drift["in_expert"] > 0.5 and drift["in_average"] < drift["in_expert"] / 2


def test_heads_are_looked_at_only_if_asked(tmp_path):
    found = described(tmp_path, "c", composition=False)
    assert found["composition"] == {}
    assert "composition" not in [diagnosis for diagnosis, _, _ in told(found)]


def test_where_the_number_of_heads_is_unknown_it_is_refused(tmp_path):
    base = llama(tmp_path)
    (tmp_path / "config.json").unlink()
    family = save(tmp_path, base, unrelated("ab", base))
    with refused("which heads its attention has", "leave composition out"):
        describe_family(**family, ranks=(1.0,), workers=1, composition=True)


def test_shared_keys_and_norms_are_part_of_what_is_read(tmp_path):
    """|L R| / (|L| |R|) of matrices of the model's width, of the pair that the base and two experts differ in most."""
    base = llama(tmp_path)
    taus = unrelated("ab", base)
    family = save(tmp_path, base, taus)
    found = describe_family(**family, ranks=(1.0,), workers=1, composition=True)["diagnoses"]
    [tower] = found["composition"].values()
    drift = tower["experts"]["a"]
    matrices = {name: (base[name] + taus["a"][name]).double() for name in base}

    def head(layer: int, number: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer}."
        gain = matrices[f"{prefix}input_layernorm.weight"]
        shared = number * GROUPS // HEADS

        def rows(part: str, at: int) -> Tensor:
            return matrices[f"{prefix}self_attn.{part}_proj.weight"][at * E : (at + 1) * E] * gain

        output = matrices[f"{prefix}self_attn.o_proj.weight"][:, number * E : (number + 1) * E]
        attention = rows("q", number).T @ rows("k", shared)
        return {"query": attention.T, "key": attention, "value": output @ rows("v", shared)}

    left, right = head(*drift["reader"])[drift["kind"]], head(*drift["writer"])["value"]
    assert drift["in_expert"] == pytest.approx(
        float((left @ right).norm() / left.norm() / right.norm()), rel=1e-5
    )


def test_scores_are_those_of_whole_matrices():
    random = torch.Generator().manual_seed(3)
    tensors = {
        f"{i}.{part}": torch.randn(12, 12, generator=random).double() for i in range(2) for part in "qkvo"
    }
    modules = [Attention(f"{i}", *(Part(f"{i}.{part}", 0, 12, 12) for part in "qkvo")) for i in range(2)]
    layers = [Layer("", i, module, 3, None) for i, module in enumerate(modules)]
    pairs, score_KP = composition(lambda part: tensors[part.tensor], layers)
    assert len(pairs) == 9 and score_KP.shape == (3, 9)
    for (k, kind), (p, (writer, reader)) in product(enumerate(KINDS), enumerate(pairs)):
        a, b = (slice(4 * number, 4 * number + 4) for number in (reader[1], writer[1]))
        attention = tensors["1.q"][a].T @ tensors["1.k"][a]
        values = tensors["1.o"][:, a] @ tensors["1.v"][a]
        left = {"query": attention.T, "key": attention, "value": values}[kind]
        right = tensors["0.o"][:, b] @ tensors["0.v"][b]
        torch.testing.assert_close(score_KP[k, p], (left @ right).norm() / left.norm() / right.norm())
