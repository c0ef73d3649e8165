"""Merging files: plans, refusals, what is left behind when a merge fails, and verify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import (
    SHAPES,
    another_process,
    edit,
    file_hashes,
    gathered,
    random_state,
    refused,
    same_tensors,
    save_family,
    save_family_for,
    shard,
)
from places import MERGELINE, REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging.algebra.slots import block_elements
from mergeline.merging.api import merge_points
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.engine.cache import FolderStore
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import catalogue
from mergeline.merging.recipes.recipe import Recipe
from mergeline.merging.verify import verify


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """The average of experts a, b and c around a base; the files lie in `in/`."""
    (tmp_path / "in").mkdir()
    return save_family(tmp_path / "in")


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "in")


# --------------------------------------------------------------------------------------- what is written


def test_a_folder_holds_weights_manifest_card_and_configs(recipe, tmp_path):
    base = tmp_path / "in" / "base"
    base.mkdir()
    recipe["base"].rename(base / "model.safetensors")
    (base / "open_clip_config.json").write_text("{}")
    (base / "notes.txt").write_text("not copied")
    manifest = merge({**recipe, "base": base}, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "manifest.json", "model.safetensors", "open_clip_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert left_over(tmp_path) == ["out"]


def test_the_manifest_says_what_was_merged_from_what(recipe, tmp_path):
    manifest = merge({**recipe, "method": "cart", "params": {"rank": 0.5}, "seed": 7}, tmp_path / "out")
    lineage, output = manifest["recipe"], manifest["output"]
    assert lineage["method"] == "cart" and lineage["seed"] == 7
    assert lineage["params"]["rank"] == 0.5 and lineage["params"]["scale"] == 1.0  # a default
    assert list(lineage["experts"]) == ["a", "b", "c"]
    for name, entry in {**lineage["experts"], "base": lineage["base"]}.items():
        path = recipe["base"] if name == "base" else recipe["experts"][name]
        assert entry == {"path": f"../in/{path.name}", "digest": open_checkpoint(path).digest()}
    merged = open_checkpoint(tmp_path / "out")
    assert output["digest"] == merged.digest() and output["tensors"] == merged.tensor_hashes
    assert output["files"] == ["model.safetensors"] and output["bytes"] == merged.nbytes
    assert manifest["versions"]["torch"] == version("torch")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mergeline.recipe"])["params"] == lineage["params"]


def test_the_card_names_the_method_and_the_digests(recipe, tmp_path):
    manifest = merge(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Merged by average" in card and manifest["output"]["digest"] in card
    assert all(entry["digest"] in card for entry in manifest["recipe"]["experts"].values())


def test_the_same_merge_gives_the_same_bytes(recipe, tmp_path):
    merge(recipe, tmp_path / "one" / "out")
    merge(recipe, tmp_path / "two" / "out", workers=3)
    for file in (tmp_path / "one" / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "out" / file.name).read_bytes(), file.name


def test_the_recipe_digest_ignores_paths_but_not_content(recipe, tmp_path):
    first = merge(recipe, tmp_path / "out")
    moved = tmp_path / "in" / "moved.safetensors"
    recipe["experts"]["a"].rename(moved)
    recipe["experts"]["a"] = moved
    assert merge(recipe, tmp_path / "out")["recipe_digest"] == first["recipe_digest"]
    backwards = {**recipe, "experts": dict(reversed(recipe["experts"].items()))}
    assert merge(backwards, tmp_path / "out")["recipe_digest"] != first["recipe_digest"]
    edit(moved, logit_scale=torch.tensor(9.0))
    assert merge(recipe, tmp_path / "out")["recipe_digest"] != first["recipe_digest"]


def test_shard_size(recipe, tmp_path):
    whole = merge(recipe, tmp_path / "whole")
    sharded = merge({**recipe, "shard_size": 100}, tmp_path / "sharded")
    assert sharded["output"]["files"] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (tmp_path / "sharded" / INDEX).exists()
    assert (
        sharded["output"]["digest"]
        == whole["output"]["digest"]
        == open_checkpoint(tmp_path / "sharded").digest()
    )


def test_shards_in_one_file_are_refused(recipe, tmp_path):
    with refused("--shard-size", "folder"):
        merge({**recipe, "shard_size": 100}, tmp_path / "out.safetensors")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_output_dtype(dtype, recipe, tmp_path):
    edit(recipe["base"], ids=torch.arange(3))
    merge({**recipe, "dtype": dtype}, tmp_path / "out.safetensors")
    exact = merge_state_dicts("average", {n: load_file(p) for n, p in recipe["experts"].items()})
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.pop("ids").dtype == torch.int64
    assert all(t.dtype == getattr(torch, dtype) for t in merged.values())
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6)
    assert all(
        torch.allclose(t.double(), exact[n].double(), rtol=tolerance, atol=1e-6) for n, t in merged.items()
    )


def test_float64_inputs_lose_nothing(recipe, tmp_path):
    exact = {name: t + 1e-12 for name, t in random_state(0, torch.float64).items()}
    recipe["experts"].pop("c")  # the mean of two is exact
    for path in (recipe["base"], *recipe["experts"].values()):
        save_file(exact, path)
    merge(recipe, tmp_path / "out.safetensors")
    assert same_tensors(load_file(tmp_path / "out.safetensors"), exact)


def test_tensors_of_integers_are_copied(recipe, tmp_path):
    buffers = {
        "flags": torch.tensor([True, False]),
        "ids": torch.tensor([[1, 2]]),
        "big": torch.tensor([2**63], dtype=torch.uint64),
    }
    for path in (recipe["base"], *recipe["experts"].values()):
        edit(path, **buffers)
    merge(recipe, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert same_tensors({name: merged[name] for name in buffers}, buffers)
    edit(recipe["experts"]["b"], ids=torch.tensor([[1, 3]]))
    with refused("'b'", "'ids'", "differs"):
        merge(recipe, tmp_path / "other.safetensors")
    edit(recipe["experts"]["b"], ids=torch.tensor([[1, 2]], dtype=torch.int32))
    with refused("'ids'", "I32 in expert 'b'", "I64 in 'base'"):
        merge(recipe, tmp_path / "other.safetensors")


def test_tensors_that_only_the_base_has_are_copied_with_a_warning(recipe, tmp_path):
    extra = torch.tensor([0.1, 1e30], dtype=torch.float32)
    edit(recipe["base"], extra=extra)
    assert "'extra'" in make_plan(recipe).warnings[0]
    merge(recipe, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["extra"], extra)


def test_progress_counts_every_tensor(recipe, tmp_path):
    for workers in (1, 2):
        seen: list[tuple[int, int]] = []
        merge(
            recipe, tmp_path / "out", workers=workers, progress=lambda *counts, seen=seen: seen.append(counts)
        )
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_progress_counts_the_bytes_that_are_read(recipe, tmp_path):
    seen: list[tuple[int, int]] = []
    merge(recipe, tmp_path / "out", progress=lambda done, total: seen.append((done.bytes, total.bytes)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[0][0] > 0
    assert {total for _, total in seen} == {seen[-1][0]} == {make_plan(recipe).bytes_read}


def test_threads_are_put_back(recipe, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(recipe, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------- plans


def test_a_plan_counts_what_will_be_read_and_written(recipe):
    summary = make_plan({**recipe, "dtype": "float16"}).summary()
    assert summary["tensors"] == {"merge": 4, "copy": 0}
    assert summary["bytes_read"] == 4 * 188 and summary["bytes_written"] == 94
    assert summary["problems"] == [] and summary["peak_bytes"] >= 24 * (4 * 4 + 8)


def test_a_plan_lists_all_problems_at_once(recipe, tmp_path):
    recipe["experts"]["b"].unlink()
    recipe["experts"]["c"].write_bytes(b"not a checkpoint")
    plan = make_plan({**recipe, "method": "task_arithmetic", "params": {"weights": [1.0]}})
    assert len(plan.problems) == 3
    for part, problem in zip(("1 weights for 3 experts", "b: ", "c: "), plan.problems):
        assert part in problem
    with refused("1 weights for 3 experts", "2 more", "mergeline plan"):
        plan.check()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"method": "crat"}, ["unknown method 'crat'", "did you mean 'cart'?"]),
        ({"method": "cart", "params": {"rnak": 1}}, ["unknown parameter 'rnak'", "did you mean 'rank'?"]),
        ({"method": "cart", "params": {"rank": 2}}, ["cart: rank = 2"]),
        ({"method": "ties", "base": None}, ["ties", "base"]),
        ({"method": "cart", "params": {"origin": "task_arithmetic"}, "base": None}, ["cart", "base"]),
        ({"experts": {}}, ["at least 1 expert"]),
    ],
)
def test_recipes_that_cannot_work(change, parts, recipe, tmp_path):
    with refused(*parts):
        merge({**recipe, **change}, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"metod": "cart"}, "metod"),
        ({"dtype": "float8"}, "dtype"),
        ({"seed": "x"}, "seed"),
        ({"experts": ["a"]}, "experts"),
    ],
)
def test_recipes_with_wrong_keys_or_types(change, part, recipe):
    with refused("recipe", part):
        make_plan({**recipe, **change})


def test_cart_of_two_experts_warns(recipe):
    recipe["experts"].pop("c")
    assert "equals their average" in make_plan({**recipe, "method": "cart"}).warnings[0]
    assert make_plan(recipe).warnings == []


@pytest.mark.parametrize(
    ("expert", "change", "parts"),
    [
        ("b", {"blocks__1__bias": None}, ["'b' lacks 1 tensor", "'blocks.1.bias'"]),
        ("b", {"more": torch.ones(2)}, ["the base lacks 1 tensor(s) of 'b'", "'more'"]),
        ("b", {"blocks__1__bias": None, "blocks__1__bais": torch.ones(7)}, ["did you mean 'blocks.1.bais'?"]),
        ("b", {"blocks__1__bias": torch.ones(8)}, ["'blocks.1.bias'", "[8] in expert 'b'", "[7] in 'base'"]),
        ("b", {"blocks__1__bias": torch.ones(7, 1)}, ["'blocks.1.bias'", "[7, 1] in expert 'b'"]),
        (
            "b",
            {"blocks__1__bias": torch.ones(7, dtype=torch.int64)},
            ["'blocks.1.bias'", "I64 in expert 'b'"],
        ),
        (
            "b",
            {"blocks__1__bias": torch.ones(7).to(torch.float8_e4m3fn)},
            ["b: ", "F8_E4M3", "'blocks.1.bias'"],
        ),
    ],
)
def test_tensors_that_do_not_match(expert, change, parts, recipe, tmp_path):
    edit(recipe["experts"][expert], **change)
    with refused(*parts):
        merge(recipe, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_without_a_base_the_experts_must_match_each_other(recipe, tmp_path):
    edit(recipe["experts"]["b"], more=torch.ones(2))
    with refused("'a' lacks 1 tensor", "'more'"):
        merge({**recipe, "base": None}, tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_one_checkpoint_given_twice(link, recipe, tmp_path):
    recipe["experts"]["b"] = recipe["experts"]["a"]
    if link:
        recipe["experts"]["b"] = tmp_path / "in" / "link.safetensors"
        recipe["experts"]["b"].symlink_to(recipe["experts"]["a"])
    with refused("'b' and 'a' are the same checkpoint"):
        merge(recipe, tmp_path / "out")
    with refused("the same checkpoint"):
        merge({**recipe, "experts": {"a": recipe["base"]}}, tmp_path / "out")


@pytest.mark.parametrize("with_base", [True, False])
def test_an_expert_named_base(with_base, recipe, tmp_path):
    recipe["experts"]["base"] = recipe["experts"].pop("a")
    with refused("'base'", "name"):
        merge({**recipe, "base": recipe["base"] if with_base else None}, tmp_path / "out")


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
@pytest.mark.parametrize("source", ["b", "base"])
@pytest.mark.parametrize("workers", [1, 2])
def test_nan_and_inf_are_named(value, kind, source, workers, recipe, tmp_path):
    edit({**recipe["experts"], "base": recipe["base"]}[source], logit_scale=torch.tensor(value))
    with refused(f"'{source}'", "'logit_scale'", kind):
        merge({**recipe, "method": "task_arithmetic"}, tmp_path / "out", workers=workers)
    assert left_over(tmp_path) == []


def test_an_overflow_is_refused(recipe, tmp_path):
    for path in recipe["experts"].values():
        edit(path, logit_scale=torch.tensor(1e5))
    with refused("'logit_scale'", "overflows", "float16"):
        merge({**recipe, "dtype": "float16"}, tmp_path / "out")
    edit(recipe["base"], extra=torch.tensor(1e5))
    for path in recipe["experts"].values():
        edit(path, logit_scale=torch.tensor(1.0))
    with refused("'extra'", "overflows", "float16"):  # it is copied
        merge({**recipe, "dtype": "float16"}, tmp_path / "out")
    assert left_over(tmp_path) == []
    merge({**recipe, "dtype": "bfloat16"}, tmp_path / "out")


def test_memory_bounds_the_workers_or_refuses(recipe, tmp_path):
    need = make_plan(recipe).peak_bytes
    with refused(str(need), "allow more"):
        merge(recipe, tmp_path / "out", memory=need - 1)
    assert left_over(tmp_path) == []
    merge(recipe, tmp_path / "out", memory=need, workers=8)


# --------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_any_exception_leaves_what_was_there(out, error, recipe, tmp_path):
    merge(recipe, tmp_path / out)
    before = left_over(tmp_path)
    digest = open_checkpoint(tmp_path / out).digest()

    def fail(done: int, total: int) -> None:
        if done == 2:
            raise error

    edit(recipe["experts"]["a"], logit_scale=torch.tensor(3.0))
    with pytest.raises(error):
        merge(recipe, tmp_path / out, progress=fail)
    assert left_over(tmp_path) == [f".{out}.partial", *before]  # for the next run
    assert open_checkpoint(tmp_path / out).digest() == digest
    manifest = merge(recipe, tmp_path / out)
    assert left_over(tmp_path) == before
    assert open_checkpoint(tmp_path / out).digest() == manifest["output"]["digest"] != digest


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_earlier_output_is_replaced(out, recipe, tmp_path):
    merge({**recipe, "shard_size": None if "." in out else 100}, tmp_path / out)
    edit(recipe["experts"]["a"], logit_scale=torch.tensor(3.0))
    manifest = merge(recipe, tmp_path / out)
    assert open_checkpoint(tmp_path / out).digest() == manifest["output"]["digest"]
    assert left_over(tmp_path) == ([out] if out == "out" else [out, f"{out}.manifest.json"])
    if out == "out":
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == [
            "README.md",
            "manifest.json",
            "model.safetensors",
        ]


def test_a_folder_that_is_no_merge_is_not_replaced(recipe, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with refused("thesis", "no earlier merge"):
        merge(recipe, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.safetensors" / "file").touch()
    with refused("x.safetensors"):
        merge(recipe, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors" / "file").exists()


@pytest.mark.parametrize("out", ["in/a.safetensors", "in/folder"])
def test_an_input_is_not_replaced(out, recipe, tmp_path):
    shard(load_file(recipe["experts"]["b"]), tmp_path / "in" / "folder", 2)
    recipe["experts"]["b"] = tmp_path / "in" / "folder"
    digest = open_checkpoint(tmp_path / out).digest()
    with refused(out):
        merge(recipe, tmp_path / out)
    assert open_checkpoint(tmp_path / out).digest() == digest


@pytest.mark.parametrize("out", ["file/out", "file/out.safetensors", "file", "x" * 300])
def test_a_place_that_cannot_be(out, recipe, tmp_path):
    (tmp_path / "file").write_text("a file")
    with refused(out):
        merge(recipe, tmp_path / out)
    assert left_over(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_full_disk(out, tmpfs, tmp_path):
    disk = tmpfs("size=1m")
    (tmp_path / "in").mkdir()
    paths = {}
    for i, name in enumerate("ab"):
        paths[name] = tmp_path / "in" / f"{name}.safetensors"
        save_file({"w": torch.full((400_000,), float(i))}, paths[name])
    with refused(str(disk / out), "no space left"):
        merge({"method": "average", "experts": paths}, disk / out)
    assert list(disk.iterdir()) == []


def test_a_read_only_place(recipe, tmpfs):
    disk = tmpfs("ro,size=1m")
    with refused(str(disk / "out"), "cannot be written"):
        merge(recipe, disk / "out")


def test_a_second_writer_is_refused(recipe, tmp_path):
    with another_process("staged(path)", tmp_path / "out"):
        with refused("another process is writing"):
            merge(recipe, tmp_path / "out")
        assert left_over(tmp_path) == [".out.partial"]
    merge(recipe, tmp_path / "out")
    assert left_over(tmp_path) == ["out"]


# --------------------------------------------------------------------------------------- the same bytes

# Every weight is several blocks of three experts, and no whole number of them.
LARGE = {
    "blocks.0.attn.weight": (700, 900),
    "blocks.0.norm.weight": (900,),
    "blocks.1.mlp.weight": (450, 410),
    "head": (400_003,),
    "logit_scale": (),
}
METHODS = {
    "average": ("average", {}),
    "ties": ("ties", {}),
    "dare": ("dare", {"drop_rate": 0.3}),
    "dare of ties": ("dare", {"drop_rate": 0.3, "inner": "ties"}),
    "della": ("della", {}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs by tensor": ("breadcrumbs", {"scope": "tensor"}),
    "sce": ("sce", {"density": 0.3}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "cart": ("cart", {}),
    "tsv_merge": ("tsv_merge", {}),
    "iso_c": ("iso_c", {}),
    "lines of cart": ("lines", {"inner": "cart"}),
}


def test_large_tensors_are_several_blocks():
    shapes = [shape for shape in LARGE.values() if len(shape) == 2 or shape > (1000,)]
    assert len(shapes) == 3 and all(prod(shape) > block_elements(3) for shape in shapes)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], tuple[Path, Path]]:
    """Two folders with the same family of LARGE under `in/`: as single files, and as shards."""

    @cache
    def make(dtype: torch.dtype) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("large")
        family = save_family(root / "files", shapes=LARGE, dtype=dtype)
        for name, path in {**family["experts"], "base": family["base"]}.items():
            for parts, tree in enumerate(("single", "sharded"), 1):
                shard(load_file(path), root / tree / "in" / name, parts)
        return root / "single", root / "sharded"

    return make


def family_of(tree: Path, method: str, params: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe of the checkpoints under `in/`."""
    experts = {name: tree / "in" / name for name in "abc"}
    return {"method": method, "params": params, "base": tree / "in" / "base", "experts": experts, **more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", METHODS)
def test_bytes_do_not_depend_on_how_they_are_made(kind, dtype, large, tmp_path):
    single, sharded = large(dtype)
    recipe, of_shards = (family_of(tree, *METHODS[kind]) for tree in (single, sharded))
    least = make_plan(recipe).peak_bytes
    ways = [
        (single, recipe, {"workers": 1}),
        (sharded, of_shards, {"workers": 2, "memory": least, "factors": tmp_path / "factors"}),
        (single, recipe, {"workers": 4, "memory": 4 * least, "factors": tmp_path / "factors"}),
    ]
    hashes = []
    for tree, given, how in ways:
        merge(given, tree / "out", **how)
        hashes.append(file_hashes(tree / "out"))
    assert hashes[0].keys() >= {"model.safetensors", "manifest.json", "README.md"}
    assert hashes[1] == hashes[0] and hashes[2] == hashes[0]


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_factor_store_gives_back_memory_like_any_other(length, tmp_path):
    """Matrix products depend, in their last bits, on the alignment of what they multiply."""
    made = {"q" * length: torch.ones(3, 5, dtype=torch.float64)}
    FolderStore(tmp_path).recall("key", lambda: made)
    found = FolderStore(tmp_path).recall("key", dict)["q" * length]
    assert torch.equal(found, made["q" * length])
    assert found.data_ptr() % 64 == torch.ones(3, 5).data_ptr() % 64 == 0


def test_bytes_do_not_depend_on_the_hash_seed(recipe, tmp_path):
    recipes = {}
    for kind, (method, params) in METHODS.items():
        recipes[kind] = Recipe.of({**recipe, "method": method, "params": params}).model_dump(mode="json")
        merge(recipes[kind], tmp_path / "here" / kind)
    code = (
        "import json, sys; from mergeline.merging import merge\n"
        "for kind, recipe in json.loads(sys.argv[1]).items(): merge(recipe, f'{sys.argv[2]}/{kind}')"
    )
    command = [sys.executable, "-c", code, json.dumps(recipes), tmp_path / "there"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # this process has another, or a random one
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    assert file_hashes(tmp_path / "here") == file_hashes(tmp_path / "there")


# --------------------------------------------------------------------------------------- points of a sweep

POINTS = [
    *({"method": method, "params": params} for method, params in METHODS.values()),
    {"method": "cart", "params": {"rank": 0.5, "scale": 2.0}},
    {"method": "cart", "params": {"rank": 0.5, "scale": 3.0}},
    {"method": "cart", "params": {"rank_rule": "energy"}},
    {"method": "cart", "params": {"reduce": "tsv"}},
    {"method": "cart", "params": {"origin": "task_arithmetic"}},
    {"method": "cart", "params": {"origin": "tsv_merge"}},
    {"method": "cart", "params": {"origin": "cart"}},
    {"method": "tsv_merge", "params": {"orthogonalize": False}},
    {"method": "iso_c", "params": {"keys": "block_linear"}},
    {"method": "ties", "params": {"density": 0.5}},
    {"method": "ties", "params": {"reduce": "max"}},
    {"method": "ties", "params": {"variant": "mergekit"}},
    {"method": "sce", "params": {"density": 0.8}},
    {"method": "karcher", "params": {"weights": [1, 2, 3]}},
    {"method": "lines", "params": {"inner": "ties"}},
    {"method": "average", "dtype": "float16", "shard_size": 100},
    {"method": "task_arithmetic", "rules": [{"match": "*mlp*", "params": {"scale": 0.9}}]},
]


@pytest.mark.parametrize("store", [None, "factors"])
def test_points_of_a_sweep_have_the_bytes_of_single_merges(store, recipe, tmp_path):
    for t, path in enumerate((recipe["base"], *recipe["experts"].values())):
        edit(path, ids=torch.arange(3), outside=random_state(t)["blocks.0.mlp.weight"])
    points = [({**recipe, "exclude": "*attn*", **p}, tmp_path / "all" / str(i)) for i, p in enumerate(POINTS)]
    manifests = merge_points(points, workers=2, factors=store and tmp_path / store)
    for (point, out), manifest in zip(points, manifests):
        assert merge(point, tmp_path / "single" / out.name) == manifest
    assert file_hashes(tmp_path / "all") == file_hashes(tmp_path / "single")


def test_points_of_a_sweep_read_the_same_inputs(recipe, tmp_path):
    backwards = dict(reversed(recipe["experts"].items()))
    for other in ({"seed": 1}, {"exclude": "*attn*"}, {"base": None}, {"experts": backwards}):
        with refused("the same " + next(iter(other)), "one by one"):
            merge_points([(recipe, tmp_path / "one"), ({**recipe, **other}, tmp_path / "two")])
    assert left_over(tmp_path) == []


# --------------------------------------------------------------------------------------- what there is to merge


@pytest.fixture
def masked(recipe) -> dict[str, Any]:
    """DARE with given masks, one file an expert."""
    masks = []
    for t in range(3):
        masks.append(recipe["base"].with_name(f"masks-{t}.safetensors"))
        save_file({name: (v > 0).float() for name, v in random_state(10 + t).items()}, masks[t])
    return {**recipe, "method": "dare", "params": {"masks": "given"}, "statistics": {"masks": masks}}


def test_statistics_are_part_of_the_recipe_and_the_manifest(masked, tmp_path):
    manifest = merge(masked, tmp_path / "out")
    masks = masked["statistics"]["masks"]
    assert manifest["recipe"]["statistics"] == {
        "masks": [{"path": f"../in/{p.name}", "digest": open_checkpoint(p).digest()} for p in masks]
    }
    states = {name: load_file(path) for name, path in masked["experts"].items()}
    expected = merge_state_dicts(
        "dare",
        states,
        load_file(masked["base"]),
        params=masked["params"],
        statistics={"masks": [load_file(p) for p in masks]},
    )
    assert same_tensors(load_file(tmp_path / "out" / "model.safetensors"), expected)
    one = tmp_path / "in" / "masks.safetensors"
    save_file({f"{t}/{name}": v for t, p in enumerate(masks) for name, v in load_file(p).items()}, one)
    of_one = merge({**masked, "statistics": {"masks": one}}, tmp_path / "of_one")
    assert of_one["output"] == manifest["output"]
    assert of_one["recipe_digest"] != manifest["recipe_digest"]
    moved = [masks[0].rename(tmp_path / "in" / "moved.safetensors"), *masks[1:]]
    masked["statistics"]["masks"] = moved
    assert merge(masked, tmp_path / "moved")["recipe_digest"] == manifest["recipe_digest"]
    edit(masks[1], logit_scale=1 - load_file(masks[1])["logit_scale"])
    changed = merge(masked, tmp_path / "changed")
    assert changed["recipe_digest"] != manifest["recipe_digest"]
    assert changed["output"]["digest"] != manifest["output"]["digest"]


def test_verify_knows_statistics(masked, tmp_path):
    masks = masked["statistics"]["masks"]
    merge(masked, tmp_path / "out")
    assert "bit-identical" in verify(tmp_path / "out")
    edit(masks[1], logit_scale=1 - load_file(masks[1])["logit_scale"])
    with refused("masks-1.safetensors", "no longer the 'masks'"):
        verify(tmp_path / "out")


def test_statistics_that_do_not_fit(masked, tmp_path):
    masks = masked["statistics"]["masks"]

    def given(**statistics: Any) -> dict[str, Any]:
        return {**masked, "statistics": statistics}

    for out, recipe, parts in (
        ("out", given(), ["needs the statistics 'masks'"]),
        ("out", given(masks=masks, fisher=masks), ["takes no statistics 'fisher'"]),
        ("out", given(masks=masks[:2]), ["2 files for 3 experts"]),
        ("out", given(masks=[*masks[:2], tmp_path / "none"]), ["'masks'", "no such file"]),
        ("in/masks-1.safetensors", masked, ["holds the input", "masks-1.safetensors"]),
    ):
        with refused(*parts):
            merge(recipe, tmp_path / out)
    edit(masks[2], blocks__1__bias=torch.ones(3))
    with refused("'masks'", "'blocks.1.bias'", "masks-2.safetensors", "[3]", "[7]"):
        merge(masked, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_verify_knows_rules_and_exclusions(recipe, tmp_path):
    rules = [
        {"match": "*attn*", "params": {"rank": 0.9}},
        {"layers": [0, 1], "gradient": {"scale": [0.5, 2.0]}},
    ]
    rich = {**recipe, "method": "cart", "rules": rules, "exclude": ["*scale"], "excluded": "average"}
    manifest = merge(rich, tmp_path / "out")
    assert manifest["recipe"]["rules"][0]["match"] == ["*attn*"]
    assert manifest["recipe"]["exclude"] == ["*scale"]
    assert "bit-identical" in verify(tmp_path / "out")
    plain = merge({**recipe, "method": "cart"}, tmp_path / "plain")
    assert plain["output"]["digest"] != manifest["output"]["digest"]
    manifest["recipe"]["rules"] = []
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with refused("tensor(s) differ"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "ending", ["qweight", "qzeros", "SCB", "weight_packed", "weight_scale", "weight.absmax"]
)
def test_parts_of_quantised_weights_are_refused(ending, recipe, tmp_path):
    edit(recipe["experts"]["b"], **{f"blocks__0__attn__{ending}": torch.ones(4, dtype=torch.int32)})
    with refused("b: ", "is quantised", f"'blocks.0.attn.{ending}'"):
        merge(recipe, tmp_path / "out")
    assert left_over(tmp_path) == []


ODD_SHAPES = {
    **SHAPES,
    "a/b c\n\"'ä\\𝄞": (3, 4),
    "../../etc/passwd": (2,),
    "модель.0.вес": (4, 5),
    "": (2, 2),
    "\x1b[31mred\u202e": (1,),
    "x" * 5000: (3,),
    "blocks.2.empty": (0, 3),
    "blocks.2.hollow": (3, 0, 2),
    "none": (0,),
    "scalar": (),
    "blocks.2.one.weight": (1, 1),
}


@pytest.mark.parametrize("method", sorted(catalogue()))
def test_names_and_shapes_of_all_kinds(method, tmp_path):
    recipe = save_family_for(method, tmp_path / "in", ODD_SHAPES)
    merge(recipe, tmp_path / "out", factors=tmp_path / "factors")
    states = {name: load_file(path) for name, path in recipe["experts"].items()}
    statistics = gathered(method, states)
    expected = merge_state_dicts(method, states, load_file(recipe["base"]), statistics=statistics)
    assert same_tensors(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert all(p.name in ("in", "out", "factors") for p in tmp_path.iterdir())
    if method == "cart":
        merge({**recipe, "shard_size": 50}, tmp_path / "sharded")
        assert open_checkpoint(tmp_path / "sharded").digest() == open_checkpoint(tmp_path / "out").digest()
        assert "bit-identical" in verify(tmp_path / "sharded")


@pytest.mark.parametrize("method", sorted(catalogue()))
def test_a_family_without_anything_to_merge(method, tmp_path):
    recipe = save_family_for(method, tmp_path / "in", {"none": (0,)})
    ids = {"ids": torch.arange(3)}
    for path in (recipe["base"], *recipe["experts"].values()):
        edit(path, **ids)
    merge(recipe, tmp_path / "out.safetensors")
    assert same_tensors(load_file(tmp_path / "out.safetensors"), load_file(recipe["base"]))


def test_tied_weights_stay_tied(recipe, tmp_path):
    shapes = {**SHAPES, "lm_head.weight": SHAPES["blocks.0.mlp.weight"]}
    recipe = save_family(tmp_path / "in", shapes=shapes)
    for path in (recipe["base"], *recipe["experts"].values()):
        edit(path, lm_head__weight=load_file(path)["blocks.0.mlp.weight"].clone())
    for method in ("ties", "karcher", "sce"):
        merge({**recipe, "method": method}, tmp_path / "out.safetensors")
        merged = load_file(tmp_path / "out.safetensors")
        assert torch.equal(merged["lm_head.weight"], merged["blocks.0.mlp.weight"])
    edit(recipe["experts"]["b"], lm_head__weight=None)  # as it is saved where it is tied
    with refused("'b' lacks 1 tensor", "'lm_head.weight'"):
        merge(recipe, tmp_path / "other")


# --------------------------------------------------------------------------------------- signals


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[[int], subprocess.CompletedProcess]:
    """Sends a signal to a merge of some seconds as soon as it writes; `interrupted.recipe` is that merge."""
    shapes = {f"blocks.{i}.weight": (320, 320) for i in range(40)}
    (tmp_path / "in").mkdir()
    experts = {}
    for t, name in enumerate("abc"):
        experts[name] = tmp_path / "in" / f"{name}.safetensors"
        save_file(random_state(t, shapes=shapes), experts[name])

    def send(number: int) -> subprocess.CompletedProcess:
        command = [
            *MERGELINE,
            "merge",
            "--method",
            "cart",
            "--out",
            tmp_path / "out",
            "--workers",
            "2",
        ]
        for name, path in experts.items():
            command += ["--expert", f"{name}={path}"]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while not (tmp_path / ".out.partial" / "out" / "model.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    send.recipe = {"method": "cart", "experts": experts}
    return send


def test_control_c_keeps_what_was_finished(interrupted, tmp_path):
    done = interrupted(signal.SIGINT)
    assert done.returncode == 130
    assert done.stderr.startswith("mergeline: stopped") and done.stderr.count("\n") == 1
    assert left_over(tmp_path) == [".out.partial"]
    merge(interrupted.recipe, tmp_path / "out", workers=2)
    assert left_over(tmp_path) == ["out"]


def test_a_killed_merge_is_in_nobodys_way(interrupted, tmp_path):
    done = interrupted(signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert left_over(tmp_path) == [".out.partial"]
    merge(interrupted.recipe, tmp_path / "out", workers=2)
    assert left_over(tmp_path) == ["out"]
    assert verify(tmp_path / "out").startswith(f"{tmp_path / 'out'}: bit-identical")


# --------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("out", ["out", "out.safetensors", "sub/out"])
def test_verify_says_that_a_merge_is_what_its_manifest_says(out, recipe, tmp_path):
    merge(
        {**recipe, "method": "cart", "dtype": "bfloat16", "shard_size": None if "." in out else 100},
        tmp_path / out,
    )
    assert "bit-identical" in verify(tmp_path / out)
    assert not list(tmp_path.rglob(".verify-*"))


def test_verify_moves_with_its_folders(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    for name in ("in", "out"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert "bit-identical" in verify(tmp_path / "elsewhere" / "out")


def test_verify_finds_a_changed_output(recipe, tmp_path):
    merge(recipe, tmp_path / "out.safetensors")
    edit(tmp_path / "out.safetensors", logit_scale=torch.tensor(0.0))
    with refused("changed after the merge"):
        verify(tmp_path / "out.safetensors")


def test_verify_finds_a_changed_input(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    edit(recipe["experts"]["b"], logit_scale=torch.tensor(0.0))
    with refused("b.safetensors", "no longer the 'b'"):
        verify(tmp_path / "out")


def test_verify_finds_an_output_that_its_recipe_does_not_give(recipe, tmp_path):
    """The weights and the manifest's digests are those of another merge."""
    merge(recipe, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["recipe"] |= {"method": "task_arithmetic", "params": {"scale": 0.5}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with refused("4 tensor(s) differ"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"recipe": {}}', '{"recipe": 1, "output": {"digest": 1}}']
)
def test_verify_refuses_a_damaged_manifest(text, recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(text)
    with refused("manifest.json"):
        verify(tmp_path / "out")


def test_verify_refuses_what_mergeline_did_not_merge(recipe):
    with refused("no manifest"):
        verify(recipe["base"])
