"""A basis that neighbouring layers share: beside the joint SVD written out, and as it is kept in a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit, random_state, refused, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.verify import verify

KEY = "layers.{}.attn.k_proj.weight"
STRETCHES = [[0, 1], [2, 3], [4]]  # of five layers, two to a basis
sides = pytest.mark.parametrize("side", ["in", "out"])


def family(
    shape: tuple[int, int] = (4, 6), layers: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    shapes = {KEY.format(i): shape for i in range(layers)}
    shapes |= {"layers.0.mlp.up.weight": shape, "layers.1.norm.weight": (6,), "head": (3,)}
    base = random_state(seed, dtype, shapes)
    return base, {f"e{t}": random_state(seed + 1 + t, dtype, shapes) for t in range(2)}


def merged(params: dict[str, Any], *of: Any) -> dict[str, Tensor]:
    base, experts = of or family()
    return merge_state_dicts("shared_basis", experts, base, params=params)


@sides
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
def test_the_basis_is_that_of_the_joint_svd(side, of):
    base, experts = family()
    params = {"rank": 0.5, "layers": 2, "side": side, "of": of, "task": 1}
    found = merged(params, base if of == "task_vectors" else None, experts)
    start = {name: base[name] * (of == "task_vectors") for name in base}
    for stretch in STRETCHES:
        names = [KEY.format(i) for i in stretch]
        along = 0 if side == "in" else 1
        whole = torch.cat([experts["e1"][name] - start[name] for name in names], dim=along)
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        k = max(1, min(whole.shape) // 2)
        expected = ((u[:, :k] * s[:k]) @ vt[:k]).chunk(len(names), along)
        for name, part in zip(names, expected):
            assert torch.allclose(found[name], start[name] + part, atol=1e-10), name
    # Another matrix of the shape has a basis of its own; what is no matrix is the expert's.
    alone = experts["e1"]["layers.0.mlp.up.weight"] - start["layers.0.mlp.up.weight"]
    u, s, vt = torch.linalg.svd(alone, full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ vt[:2]
    assert torch.allclose(
        found["layers.0.mlp.up.weight"], start["layers.0.mlp.up.weight"] + expected, atol=1e-10
    )
    assert found["head"].equal(experts["e1"]["head"])


@sides
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    layers=st.integers(1, 5),
    together=st.integers(1, 6),
)
def test_full_rank_loses_nothing(side, seed, shape, layers, together):
    base, experts = family(shape, layers, seed)
    found = merged({"rank": 1.0, "layers": together, "side": side}, base, experts)
    for name, expected in experts["e0"].items():
        assert torch.allclose(found[name], expected, atol=1e-9), name


@sides
@given(seed=st.integers(0, 99), low=st.floats(0.05, 1), high=st.floats(0.05, 1))
def test_a_higher_rank_is_nearer(side, seed, low, high):
    base, experts = family(seed=seed)
    low, high = sorted((low, high))

    def lost(rank: float) -> float:
        found = merged({"rank": rank, "layers": 3, "side": side}, base, experts)
        return sum(float((found[name] - experts["e0"][name]).square().sum()) for name in base)

    assert lost(high) <= lost(low) + 1e-9


def test_directions_that_layers_have_in_common_take_one_basis():
    """Four layers of rank 2 in the same two directions: exact at rank 2 together, not at half of one each."""
    draws = torch.Generator().manual_seed(0)
    common_KN = torch.randn(2, 8, generator=draws, dtype=torch.float64)
    names = [KEY.format(i) for i in range(4)]
    base = {name: torch.zeros(6, 8, dtype=torch.float64) for name in names}
    expert = {name: torch.randn(6, 2, generator=draws, dtype=torch.float64) @ common_KN for name in names}
    found = merged({"rank": 2 / 8, "layers": 4}, base, {"e": expert})
    alone = merge_state_dicts("svd_compress", {"e": expert}, base, params={"rank": 1 / 6})
    for name in names:
        assert torch.allclose(found[name], expert[name], atol=1e-10)
        assert not torch.allclose(alone[name], expert[name], atol=0.1)


# --------------------------------------------------------------------------------------- in a store


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    base, experts = family(dtype=torch.float32)
    (tmp_path / "in").mkdir()
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / "in" / f"{name}.safetensors")
    return {
        "method": "shared_basis",
        "params": {"rank": 0.5, "layers": 2},
        "base": tmp_path / "in/base.safetensors",
        "experts": {name: tmp_path / "in" / f"{name}.safetensors" for name in experts},
    }


def given_back_as_merged(recipe: dict[str, Any], place: Path) -> dict[str, Tensor]:
    """The store of a recipe, each of whose experts comes back as the method merges it."""
    compress(recipe, place / "store.safetensors", force=True)
    for task, name in enumerate(recipe["experts"]):
        extract_expert(place / "store.safetensors", name, place / "out.safetensors")
        merge({**recipe, "params": {**recipe["params"], "task": task}}, place / "again.safetensors")
        assert same_tensors(load_file(place / "out.safetensors"), load_file(place / "again.safetensors"))
    assert "bit-identical" in verify(place / "store.safetensors")
    return load_file(place / "store.safetensors")


def bases(state: dict[str, Tensor], expert: int = 0) -> dict[str, tuple[int, ...]]:
    prefix = f"{expert}/basis/"
    return {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)}


def test_a_basis_is_kept_once_for_its_layers(recipe, tmp_path):
    state = given_back_as_merged(recipe, tmp_path)
    # Directions: half of 6 and, of one matrix of four rows, of 4.
    of_keys = {KEY.format(0): (6, 3), KEY.format(2): (6, 3), KEY.format(4): (6, 2)}
    assert bases(state, 0) == bases(state, 1) == {**of_keys, "layers.0.mlp.up.weight": (6, 2)}
    told = compress(recipe, tmp_path / "store.safetensors")["store"]
    numbers = 2 * 6 * 3 + 2 * 6 * 2 + 4 * (4 * 3) + 2 * (4 * 2) + 6 + 3
    assert set(told["experts"].values()) == {4 * numbers} and told["once"] == 0
    assert set(told["errors"]["experts"]["e0"]["tensors"]) == set(load_file(recipe["base"]))


@sides
def test_layers_that_are_kept_otherwise_leave_the_others_their_basis(side, recipe, tmp_path):
    recipe["params"] |= {"side": side, "layers": 4}
    state = given_back_as_merged({**recipe, "exclude": KEY.format(0)}, tmp_path)
    assert set(bases(state)) == {KEY.format(1), KEY.format(4), "layers.0.mlp.up.weight"}
    rule = {"match": KEY.format(2), "params": {"rank": 0.2}}
    state = given_back_as_merged({**recipe, "rules": [rule]}, tmp_path)
    assert set(bases(state)) == {*map(KEY.format, (0, 2, 4)), "layers.0.mlp.up.weight"}
    edit(
        recipe["base"],
        **{KEY.format(0).replace(".", "__"): load_file(recipe["base"])[KEY.format(0)].double()},
    )
    state = given_back_as_merged(recipe, tmp_path)  # what is read in float64 has a basis in float64
    assert set(bases(state)) == {*map(KEY.format, (0, 1, 4)), "layers.0.mlp.up.weight"}
    assert state[f"0/basis/{KEY.format(0)}"].dtype == torch.float64


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_packed_experts_and_transposed_layers_share_bases_too(name, tmp_path):
    torch.manual_seed(0)
    for folder in ("base", "e"):
        build(name).save_pretrained(
            tmp_path / folder, **({"save_original_format": False} if name == "mixtral" else {})
        )
    recipe = {"method": "shared_basis", "base": tmp_path / "base", "experts": {"e": tmp_path / "e"}}
    recipe["params"] = {"rank": 0.5, "layers": 2}
    compress(recipe, tmp_path / "store")
    extract_expert(tmp_path / "store", "e", tmp_path / "out")
    merge(recipe, tmp_path / "again")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(tmp_path / "again").digest()
    kept = [name for name in open_checkpoint(tmp_path / "store").tensors if name.startswith("0/basis/")]
    assert kept and not any(".1." in name.partition("layers")[2][:4] for name in kept)
    assert len([n for n in open_checkpoint(tmp_path / "store").tensors if "0/coordinates/" in n]) == 2 * len(
        kept
    )


def test_descriptions_of_bases_that_are_not_believed(recipe, tmp_path):
    store = tmp_path / "store.safetensors"
    compress(recipe, store)
    state = load_file(store)
    with safe_open(store, "pt") as file:
        written = json.loads(file.metadata()["mergeline.store"])
    for shared, part in (
        ([], "in common"),
        ([{"owner": KEY.format(1), "together": 2}], f"0/basis/{KEY.format(1)}"),
        ([{"owner": KEY.format(0), "together": 9}], "'0/coordinates/"),
        ([{"owner": KEY.format(0), "together": 0}], "together"),
        ([{"owner": "../" * 3, "together": 2}], "is not in it"),
    ):
        header = json.loads(json.dumps(written))
        header["tensors"][KEY.format(1)]["shared"] = shared
        save_file(state, store, {"mergeline.store": json.dumps(header)})
        if part == "'0/coordinates/":
            header["tensors"][KEY.format(4)]["shared"] = [{"owner": KEY.format(4), "together": 9}]
            save_file(state, store, {"mergeline.store": json.dumps(header)})
            part = f"0/basis/{KEY.format(4)}"
        with refused("damaged", part):
            extract_expert(store, "e0", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "params",
    [
        {"method": "truncate", "inner": "shared_basis", "inner_rank": 0.5},
        {"method": "dare", "inner": "shared_basis"},
        {"method": "around", "inner": "shared_basis", "origin": "average"},
    ],
    ids=lambda params: params["method"],
)
def test_what_wrappers_make_of_layers_is_not_joined(params):
    base, experts = family()
    params = {**params, "layers": 2}
    with refused("joins layers", "take it alone"):
        merge_state_dicts(params.pop("method"), experts, base, params=params)
