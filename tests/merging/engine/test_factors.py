"""The factor store: what is found there is what would be computed, and nothing is computed twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import State, random_state, refused, same_tensors
from patched import patch_everywhere
from safetensors.torch import save_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra import decompositions
from mergeline.merging.engine.cache import FolderStore, store_at

# One matrix whose few leading directions are found by themselves, two that are decomposed whole, and the rest.
SHAPES = {
    "blocks.0.attn.weight": (130, 140),
    "blocks.1.attn.weight": (20, 12),
    "blocks.1.mlp.weight": (9, 30),
    "proj": (5, 6),
    "blocks.1.bias": (20,),
}
SPECTRAL = [
    ("cart", {"rank": 0.1, "keys": "matrices"}),
    ("cart", {"rank_rule": "energy", "keys": "matrices"}),
    ("cart", {"rank": 0.1, "origin": "task_arithmetic", "keys": "matrices"}),
    ("cart", {"rank": 0.1, "reduce": "tsv", "keys": "matrices"}),
    ("cart_indexing", {"rank": 0.1, "keys": "matrices", "task": 1}),
    ("tsv_merge", {}),
    ("lowrank_task_arithmetic", {"rank": 0.1, "keys": "matrices"}),
]
FILES = "*/*.factors"


def family(dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    states = [random_state(seed, dtype, SHAPES) for seed in range(4)]
    return states[0], dict(zip("abc", states[1:]))


@pytest.fixture
def decomposed(monkeypatch) -> list[tuple[int, int]]:
    """Side and rank of every decomposition."""
    calls: list[tuple[int, int]] = []
    leading = decompositions.leading

    def counted(gram_RR: torch.Tensor, k: int) -> Any:
        calls.append((gram_RR.shape[0], k))
        return leading(gram_RR, k)

    patch_everywhere(monkeypatch, "leading", counted)
    return calls


# --------------------------------------------------------------------------------------- the store


def test_an_entry_is_made_once(tmp_path):
    store, made = FolderStore(tmp_path / "store"), []

    def make() -> State:
        made.append(1)
        return {"q": torch.arange(6.0).reshape(2, 3).T, "e": torch.tensor(1 / 3, dtype=torch.float64)}

    for _ in range(3):
        assert same_tensors(store.recall({"a": 1, "b": [2, None]}, make), make())
    assert same_tensors(FolderStore(tmp_path / "store").recall({"b": [2, None], "a": 1}, make), make())
    assert len(made) == 1 + 4  # of these, one by the store
    store.recall({"a": 2}, make)
    assert len(list((tmp_path / "store").glob(FILES))) == 2
    assert [p for p in (tmp_path / "store").rglob("*") if "partial" in p.name] == []


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "safetensors", "another entry", "flipped"])
def test_a_damaged_entry_is_made_anew(damage, tmp_path):
    store = FolderStore(tmp_path)
    value = {"w": torch.arange(100.0)}
    store.recall("key", lambda: value)
    [path] = tmp_path.glob(FILES)
    store.recall("another key", lambda: {"w": torch.ones(100)})
    [another] = set(tmp_path.glob(FILES)) - {path}
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-30] ^= 1
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[:-1],
            "text": b"these are no tensors",
            "safetensors": whole[32:],
            "another entry": another.read_bytes(),
            "flipped": bytes(flipped),
        }[damage]
    )
    assert same_tensors(store.recall("key", lambda: value), value)
    assert path.read_bytes() == whole


def test_the_folder_of_a_store(tmp_path):
    assert store_at(None) is None
    assert store_at(str(tmp_path)).folder == store_at(tmp_path).folder == tmp_path
    (tmp_path / "file").touch()
    with refused(str(tmp_path / "file"), "folder"):
        store_at(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_store_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with refused(str(tmp_path), "cannot be written"):
        FolderStore(tmp_path).recall("key", lambda: {"w": torch.ones(1)})


# --------------------------------------------------------------------------------------- merges


@pytest.mark.parametrize(("method", "params"), SPECTRAL)
def test_a_merge_is_the_same_with_a_store_and_the_next_one_decomposes_nothing(
    method, params, decomposed, tmp_path
):
    base, experts = family()
    without = merge_state_dicts(method, experts, base, params=params)
    count = len(decomposed)
    store = FolderStore(tmp_path)
    assert same_tensors(merge_state_dicts(method, experts, base, params=params, factors=store), without)
    assert len(decomposed) == 2 * count > 0
    for scale in (None, 2.0):
        found = merge_state_dicts(
            method, experts, base, params={**params, **({"scale": scale} if scale else {})}, factors=store
        )
        assert same_tensors(found, without) is (scale is None)
    assert len(decomposed) == 2 * count


def test_other_ranks_subsets_and_methods_find_the_same_directions(decomposed, tmp_path):
    base, experts = family()
    store = FolderStore(tmp_path)

    def decompositions(method: str, of: dict[str, State] = experts, **params: Any) -> list[tuple[int, int]]:
        decomposed.clear()
        found = merge_state_dicts(method, of, base, params={"keys": "matrices", **params}, factors=store)
        made = list(decomposed)
        assert same_tensors(found, merge_state_dicts(method, of, base, params={"keys": "matrices", **params}))
        return made

    assert len(decompositions("lowrank_task_arithmetic", rank=0.1)) == 12
    for rank in (0.01, 0.05, 0.125):  # of 130, up to 16 directions
        assert decompositions("lowrank_task_arithmetic", rank=rank) == []
    assert decompositions("lowrank_task_arithmetic", rank=0.25) == [(130, 32)] * 3
    assert decompositions("tsv_merge", rank=0.2) == []
    assert decompositions("tsv_merge", {k: experts[k] for k in "ac"}, rank=0.1) == []
    assert len(decompositions("cart", rank=0.1)) == 12  # another reference
    assert decompositions("cart_indexing", rank=0.1, task=2) == []
    assert len(decompositions("cart", {k: experts[k] for k in "ac"}, rank=0.1)) == 8  # another mean
    assert len(decompositions("cart", rank=0.1, origin="task_arithmetic", origin_scale=0.1)) == 12
    assert len(decompositions("cart", rank=0.1, origin="task_arithmetic", origin_scale=0.2)) == 12


def test_changed_bytes_are_decomposed_anew(decomposed, tmp_path):
    base, experts = family()
    params, store = {"rank": 0.1, "keys": "matrices"}, FolderStore(tmp_path)

    def decompositions() -> list[tuple[int, int]]:
        decomposed.clear()
        found = merge_state_dicts("lowrank_task_arithmetic", experts, base, params=params, factors=store)
        made = list(decomposed)
        assert same_tensors(found, merge_state_dicts("lowrank_task_arithmetic", experts, base, params=params))
        return made

    assert len(decompositions()) == 12
    for state, made in ((experts["b"], 1), (base, 3)):
        state["proj"] = state["proj"].nextafter(torch.tensor(1.0))
        assert decompositions() == [(5, 5)] * made


def test_equal_bytes_of_another_shape_have_other_directions(tmp_path):
    base = {"a": torch.zeros(4, 6), "b": torch.zeros(6, 4)}
    values = torch.randn(24, generator=torch.Generator().manual_seed(0))
    experts = {"e": {name: values.reshape(zero.shape) for name, zero in base.items()}}
    params = {"rank": 0.5, "keys": "matrices"}
    found = merge_state_dicts(
        "lowrank_task_arithmetic", experts, base, params=params, factors=FolderStore(tmp_path)
    )
    assert same_tensors(found, merge_state_dicts("lowrank_task_arithmetic", experts, base, params=params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "params"), SPECTRAL)
def test_files_give_the_same_with_and_without_a_store(method, params, dtype, decomposed, tmp_path: Path):
    base, experts = family(dtype)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("base", *experts)}
    for name, state in {"base": base, **experts}.items():
        save_file(state, paths[name])
    recipe = {"method": method, "params": params, "base": paths.pop("base"), "experts": paths}
    merge(recipe, tmp_path / "without")
    files = sorted(p.name for p in (tmp_path / "without").iterdir())
    for workers in (2, 1):  # the first fills the store
        decomposed.clear()
        merge(recipe, tmp_path / "with", workers=workers, factors=tmp_path / "store")
        assert bool(decomposed) is (workers == 2)
        for file in files:
            assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
