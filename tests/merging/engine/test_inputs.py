"""Inputs that change while they are read are noticed before anything is published; NaN gets through nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import SHAPES, edit, file_hashes, random_state, refused, save_family
from safetensors.torch import load_file, save_file

from mergeline.merging import merge, merge_state_dicts
from mergeline.merging import sweep as module
from mergeline.merging.api import merge_points
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.sweep import sweep
from mergeline.merging.verify import verify

Recipe = dict[str, Any]
Progress = Callable[[int, int], None]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """TIES, which reads everything twice."""
    return save_family(tmp_path / "in", shapes=SHAPES, method="ties")


def rewrite(path: Path) -> None:
    """Other weights of the same shapes, in place."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 16)
        file.write(torch.ones(4).numpy().tobytes())


def rewrite_with_the_same_time(path: Path) -> None:
    times = path.stat()
    rewrite(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    """As a download, or an editor, does."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    times = path.stat()
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.rename(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


CHANGES = [rewrite, rewrite_with_the_same_time, replace, cut, Path.unlink]


def merge_while(recipe: Recipe, out: Path, progress: Progress) -> None:
    merge(recipe, out, workers=1, progress=progress)


def merge_to_file_while(recipe: Recipe, out: Path, progress: Progress) -> None:
    merge(recipe, out.with_suffix(".safetensors"), workers=1, progress=progress)


def sweep_while(recipe: Recipe, out: Path, progress: Progress) -> None:
    sweep(recipe, {"scale": [1.0, 2.0], "density": [0.2, 0.5]}, out, workers=1, progress=progress)


def compress_while(recipe: Recipe, out: Path, progress: Progress) -> None:
    compress({**recipe, "method": "emr"}, out, workers=1, progress=progress)


def extract_lora_while(recipe: Recipe, out: Path, progress: Progress) -> None:
    extract_lora({**recipe, "method": "average"}, out, rank=1, workers=1, progress=progress)


WRITES = [merge_while, merge_to_file_while, sweep_while, compress_while, extract_lora_while]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_is_named_and_nothing_is_written(change, write, recipe, tmp_path):
    path = recipe["experts"]["b"]

    def meanwhile(done: int, total: int) -> None:
        if done == total:
            change(path)

    with refused(str(path), "run again"):
        write(recipe, tmp_path / "out", meanwhile)
    left = [p for p in tmp_path.rglob("*") if p.is_file() and "in" not in p.relative_to(tmp_path).parts]
    assert left == []


@pytest.mark.parametrize("name", ["base", "statistics", "tokenizer.json", "config.json"])
def test_every_file_that_is_read_is_looked_at(name, recipe, tmp_path):
    folder = tmp_path / "in" / "folder"
    folder.mkdir()
    recipe["base"] = recipe["base"].rename(folder / "model.safetensors").parent
    for config in ("tokenizer.json", "config.json"):
        (folder / config).write_text("{}")
    recipe = {**recipe, "method": "fisher"}
    recipe["statistics"] = {"fisher": []}
    for t, path in enumerate(recipe["experts"].values()):
        file = tmp_path / "in" / f"fisher-{t}.safetensors"
        save_file({k: v.square() for k, v in load_file(path).items()}, file)
        recipe["statistics"]["fisher"].append(file)
    places = {"base": folder / "model.safetensors", "statistics": recipe["statistics"]["fisher"][1]}
    place = places.get(name, folder / name)

    def meanwhile(done: int, total: int) -> None:
        if done == 1:
            place.write_text('{"a": 1}') if place.suffix == ".json" else rewrite(place)

    with refused(str(place), "was changed while it was read"):
        merge(recipe, tmp_path / "out", progress=meanwhile)
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_inputs_have_changed_since_is_refused(recipe, tmp_path):
    plan = make_plan(recipe)
    rewrite(recipe["experts"]["a"])
    with refused("a.safetensors", "was changed"):
        merge(plan, tmp_path / "out")
    merge(make_plan(recipe), tmp_path / "out")


def test_what_was_merged_from_a_changed_input_is_not_gone_on_with(recipe, tmp_path):
    """Neither by the same process after a refusal, nor after a kill in the middle."""

    def meanwhile(done: int, total: int) -> None:
        if done == 2:
            rewrite(recipe["experts"]["b"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", workers=1, progress=meanwhile)
    merge(recipe, tmp_path / "out", workers=1)
    merge(recipe, tmp_path / "new" / "out", workers=1)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "new/out/model.safetensors"
    ).read_bytes()
    assert "bit-identical" in verify(tmp_path / "out")


def test_an_input_that_changes_between_the_batches_of_a_sweep_is_noticed(recipe, tmp_path, monkeypatch):
    """Headers are read once for all batches, so files must be what they were then."""

    def merged_and_changed(*args: Any, **kwargs: Any) -> Any:
        made = merge_points(*args, **kwargs)
        rewrite(recipe["experts"]["a"])
        return made

    monkeypatch.setattr(module, "merge_points", merged_and_changed)
    monkeypatch.setattr(module, "_POINTS", 1)
    with refused("a.safetensors", "was changed"):
        sweep(recipe, {"scale": [1.0, 2.0]}, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scale-1.0"]


def test_a_link_that_a_cache_makes_of_an_input_is_no_change(recipe, tmp_path):
    def meanwhile(done: int, total: int) -> None:
        if done == total:
            os.link(recipe["experts"]["b"], tmp_path / "cached")

    merge(recipe, tmp_path / "out", progress=meanwhile)
    assert "bit-identical" in verify(tmp_path / "out")


def test_a_store_that_changes_while_an_expert_is_extracted(recipe, tmp_path):
    store = tmp_path / "store.safetensors"
    compress({**recipe, "method": "emr"}, store)
    for path in (store, recipe["base"]):
        with refused(str(path), "was changed while it was read"):
            extract_expert(
                store,
                "a",
                tmp_path / "a",
                progress=lambda done, total, path=path: done == total and os.utime(path),
            )
        assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["only in the base", "excluded", "kept", "in half"])
def test_nan_in_what_is_copied_is_refused(where, value, recipe, tmp_path):
    wrong = torch.tensor([1.0, float(value)])
    if where == "only in the base":
        edit(recipe["base"], extra=wrong)
    elif where == "in half":
        edit(recipe["base"], extra=wrong.half())
    else:
        origin = recipe["base"] if where == "excluded" else recipe["experts"]["c"]
        recipe |= {"exclude": ["*bias"]} if where == "excluded" else {"keep": {"*bias": "c"}}
        edit(origin, blocks__1__bias=torch.full((7,), float(value)))
    with refused("'c'" if where == "kept" else "'base'", "NaN" if value == "nan" else "Inf"):
        merge(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_nan_in_what_only_a_base_in_memory_has_is_refused():
    base = random_state(0)
    experts = {name: random_state(t) for t, name in enumerate("ab", 1)}
    for dtype in (torch.float32, torch.float16, torch.float8_e5m2):
        base["extra"] = torch.tensor([float("nan")]).to(dtype)
        with refused("'base'", "'extra'", "NaN"):
            merge_state_dicts("average", experts, base)
    base["extra"] = torch.tensor([1.0])
    assert merge_state_dicts("average", experts, base)["extra"] is base["extra"]


def test_large_values_in_half_precision_are_no_inf(recipe, tmp_path):
    """Their sum overflows; none of them is Inf."""
    large = torch.full((400,), 60000.0, dtype=torch.float16)
    edit(recipe["base"], extra=large)
    merge(recipe, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["extra"], large)
    assert file_hashes(tmp_path / "out")
