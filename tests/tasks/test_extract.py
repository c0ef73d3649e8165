"""The extract step: numbers against their definitions, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_state, refused, save_family
from safetensors.torch import load_file, save_file

from mergeline.merging.algebra import slots
from mergeline.tasks.extract import extract

MATRICES = ("blocks.0.attn.weight", "blocks.0.mlp.weight")


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    return save_family(tmp_path)


def run(family: dict[str, Any], out: Path) -> dict[str, Any]:
    extract(family["base"], family["experts"], out)
    return json.loads((out / "description.json").read_text())


# --------------------------------------------------------------------------------------- description


@pytest.mark.parametrize("block", [1 << 19, 12])
def test_the_description_agrees_with_definitions(block, family, tmp_path, monkeypatch):
    """Whether a tensor is one block or many."""
    monkeypatch.setattr(slots, "_BLOCK", block)
    found = run(family, tmp_path / "out")
    base = load_file(family["base"])
    names = sorted(base)
    states = {e: load_file(p) for e, p in family["experts"].items()}
    flat = {e: torch.cat([(s[n] - base[n]).reshape(-1) for n in names]).double() for e, s in states.items()}
    base_norm = torch.cat([base[n].reshape(-1) for n in names]).double().norm()
    experts = list(flat)
    for i, a in enumerate(experts):
        entry = found["experts"][a]
        assert entry["norm"] == pytest.approx(float(flat[a].norm()), rel=1e-5)
        assert entry["relative_norm"] == pytest.approx(float(flat[a].norm() / base_norm), rel=1e-5)
        assert sum(entry["energy_by_block"].values()) == pytest.approx(1, rel=1e-5)
        assert set(entry["energy_by_block"]) == {"block 0", "block 1", "outside blocks"}
        for name in names:
            norm = float((states[a][name] - base[name]).double().norm())
            assert found["tensor_norms"][name][i] == pytest.approx(norm, rel=1e-4)
        for j, b in enumerate(experts):
            cosine = float(flat[a] @ flat[b] / flat[a].norm() / flat[b].norm())
            assert found["cosine"][i][j] == pytest.approx(cosine, abs=1e-5)
            conflict = float(
                ((flat[a] * flat[b]) < 0).double().sum() / ((flat[a] * flat[b]) != 0).double().sum()
            )
            assert found["sign_conflict"][i][j] == pytest.approx(conflict, abs=1e-5)


def test_leading_directions_hold_what_the_svd_says(family, tmp_path):
    found = run(family, tmp_path / "out")
    states = {e: load_file(p) for e, p in family["experts"].items()}
    for expert, state in states.items():
        held = total = 0.0
        for name in MATRICES:
            centre = torch.stack([s[name] for s in states.values()]).double().mean(0)
            s = torch.linalg.svdvals(state[name].double() - centre) ** 2
            held += float(s[: max(1, int(0.64 * len(s)))].sum())
            total += float(s.sum())
        shares = found["experts"][expert]["energy_in_leading_directions"]
        assert shares["0.64"] == pytest.approx(held / total, rel=1e-5)
        assert shares["1"] == pytest.approx(1, rel=1e-5)
        assert list(shares.values()) == sorted(shares.values())


def test_the_same_inputs_give_the_same_bytes(family, tmp_path):
    for name in ("one", "two"):
        run(family, tmp_path / name)
    for file in (f for f in (tmp_path / "one").rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


# --------------------------------------------------------------------------------------- refusals


def test_experts_that_cannot_be(family, tmp_path):
    base = load_file(family["base"])
    one = family["experts"]["a"]
    save_file(base, tmp_path / "copy.safetensors")
    save_file(load_file(one), tmp_path / "twin.safetensors")
    save_file(random_state(99), tmp_path / "stranger.safetensors")
    for name, parts in {
        "copy": ["'copy' equals the base"],
        "twin": ["'a' and 'twin' are the same"],
        "stranger": ["'stranger' was not fine-tuned from this base", "cosine"],
    }.items():
        with refused(*parts):
            extract(family["base"], {"a": one, name: tmp_path / f"{name}.safetensors"}, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
