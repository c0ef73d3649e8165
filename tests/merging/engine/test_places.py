"""Where outputs may go: an input, or what is no earlier output of the same kind, is never replaced."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import file_hashes, refused, save_family, shard
from safetensors.torch import load_file, save_file

from mergeline.merging import merge
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.files import remove, staging_of
from mergeline.merging.sweep import sweep

Recipe = dict[str, Any]

MATRICES = {"blocks.0.attn.weight": (6, 4), "blocks.0.mlp.weight": (3, 5), "logit_scale": ()}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The average of `a`, `b` and `c`; the base is a folder of one file, `b` of two shards."""
    made = save_family(tmp_path / "in", shapes=MATRICES)
    folder = tmp_path / "in" / "base"
    folder.mkdir()
    made["base"].rename(folder / "model.safetensors")
    shards = shard(load_file(made["experts"]["b"]), tmp_path / "in" / "b", 2)
    return {**made, "base": folder, "experts": {**made["experts"], "b": shards}}


def to_store(recipe: Recipe, out: Path, **options: Any) -> None:
    compress({**recipe, "method": "tall_mask"}, out, **options)


def to_adapter(recipe: Recipe, out: Path, **options: Any) -> None:
    extract_lora(recipe, out, rank=1, **options)


WRITES: dict[str, Callable[..., Any]] = {"merge": merge, "store": to_store, "adapter": to_adapter}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
forced = pytest.mark.parametrize("force", [False, True], ids=["", "force"])


# --------------------------------------------------------------------------------------- inputs


@forced
@every_write
@pytest.mark.parametrize(
    "out",
    ["in/base/model.safetensors", "in/b/part-0.safetensors", "in/a.safetensors", "in/base", "in/b", "in"],
)
def test_a_file_that_is_read_is_not_replaced(out, write, force, recipe, tmp_path):
    before = file_hashes(tmp_path)
    with refused(f"{tmp_path / out}: ", "the input", "choose another place"):
        write(recipe, tmp_path / out, force=force)
    assert file_hashes(tmp_path) == before


@forced
@every_write
def test_an_input_by_another_name_is_not_replaced(write, force, recipe, tmp_path):
    """A hard link of it, what a link that was named leads to, the folder of that, and a link to it."""
    model = tmp_path / "in" / "base" / "model.safetensors"
    os.link(model, tmp_path / "same.safetensors")
    with refused("same.safetensors: holds the input"):
        write(recipe, tmp_path / "same.safetensors", force=force)
    named = tmp_path / "in" / "link.safetensors"
    named.symlink_to(model)
    before = file_hashes(tmp_path)
    for out in (model, model.parent, tmp_path / "in"):
        with refused("the input"):
            write({**recipe, "base": named}, out, force=force)
    assert file_hashes(tmp_path) == before
    (tmp_path / "out.safetensors").symlink_to("in/a.safetensors")
    with refused("out.safetensors: is a link", "in/a.safetensors"):
        write(recipe, tmp_path / "out.safetensors", force=force)


@forced
def test_statistics_stores_and_bases_are_not_replaced(force, recipe, tmp_path):
    store = tmp_path / "store"
    to_store(recipe, store)
    for out in (store / "model.safetensors", tmp_path / "in" / "base" / "model.safetensors", store):
        before = file_hashes(tmp_path)
        with refused("holds the input"):
            extract_expert(store, "a", out, force=force)
        assert file_hashes(tmp_path) == before


@forced
def test_a_file_does_not_become_a_part_of_an_input(force, recipe, tmp_path):
    """Beside another file of weights, or under the name that is looked for first."""
    (tmp_path / "in" / "base" / "model.safetensors").rename(tmp_path / "in" / "base" / "weights.safetensors")
    with refused("model.safetensors", "a part of the input"):
        merge(recipe, tmp_path / "in" / "base" / "model.safetensors", force=force)


# --------------------------------------------------------------------------------------- what nobody wrote by it


@every_write
@pytest.mark.parametrize("name", ["mine.safetensors", "mine"])
def test_what_has_no_manifest_is_replaced_by_force_alone(name, write, recipe, tmp_path):
    out = tmp_path / name
    if out.suffix:
        save_file({"w": torch.ones(3)}, out)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = file_hashes(out)
    with refused(name, "is there already and is no earlier", "--force"):
        write(recipe, out)
    assert file_hashes(out) == before
    write(recipe, out, force=True)
    assert file_hashes(out).keys() != before.keys() or file_hashes(out) != before
    assert not (out / "notes.txt").exists()
    write(recipe, out)  # now it is an earlier output


@pytest.mark.parametrize(
    "manifest", [{"manifest_version": 3, "name": "extension"}, {"format": 1}, {"recipe": {}, "format": 2}, []]
)
@pytest.mark.parametrize("name", ["mine.safetensors", "mine"])
def test_another_programs_manifest_is_no_earlier_merge(name, manifest, recipe, tmp_path):
    out = tmp_path / name
    if out.suffix:
        save_file({"w": torch.ones(3)}, out)
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(manifest))
    else:
        out.mkdir()
        (out / "manifest.json").write_text(json.dumps(manifest))
    before = file_hashes(tmp_path)
    with refused("is no earlier merge"):
        merge(recipe, out)
    assert file_hashes(tmp_path) == before


def test_a_manifest_beside_no_weights_is_kept(recipe, tmp_path):
    (tmp_path / "x.safetensors.manifest.json").write_text('{"mine": 1}')
    with refused("is no earlier merge"):
        merge(recipe, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors.manifest.json").read_text() == '{"mine": 1}'


def test_an_output_of_another_kind_is_not_replaced(recipe, tmp_path):
    merge(recipe, tmp_path / "merge")
    to_store(recipe, tmp_path / "store")
    to_adapter(recipe, tmp_path / "adapter")
    extract_expert(tmp_path / "store", "a", tmp_path / "expert")
    before = file_hashes(tmp_path)
    for kind, write in WRITES.items():
        for other in ("merge", "store", "adapter", "expert"):
            if other != kind:
                with refused(f"is no earlier {kind}"):
                    write(recipe, tmp_path / other)
    with refused("is no earlier expert"):
        extract_expert(tmp_path / "store", "a", tmp_path / "merge")
    assert file_hashes(tmp_path) == before


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_weights_that_took_the_name_of_a_merge_are_kept(name, recipe, tmp_path):
    out = tmp_path / name
    merge(recipe, out)
    weights = out if out.suffix else out / "model.safetensors"
    save_file({"mine": torch.ones(2)}, weights)
    with refused("is no earlier merge"):
        merge(recipe, out)
    assert load_file(weights).keys() == {"mine"}
    weights.write_bytes(weights.read_bytes()[:20])  # damaged: nothing to keep
    merge(recipe, out)


@pytest.mark.parametrize("added", ["notes.txt", ".git", "evaluation"])
@every_write
def test_what_was_put_into_an_earlier_output_is_kept(added, write, recipe, tmp_path):
    out = tmp_path / "out"
    write(recipe, out)
    if added == "notes.txt":
        (out / added).write_text("mine")
    else:
        (out / added).mkdir()
        (out / added / "file").write_text("mine")
    before = file_hashes(out)
    with refused(f"{out}: holds '{added}', which Mergeline did not write"):
        write(recipe, out)
    assert file_hashes(out) == before


@forced
@pytest.mark.parametrize("out", ["a/b", "a", "a/b/model.safetensors"])
def test_a_repository_is_not_replaced(out, force, recipe, tmp_path):
    (tmp_path / "a" / "b" / ".git").mkdir(parents=True)
    (tmp_path / "a" / "b" / "model.safetensors").write_bytes(b"mine")
    before = file_hashes(tmp_path)
    if force and out.endswith(".safetensors"):
        merge(recipe, tmp_path / out, force=True)  # a file in it is not the repository
        assert (tmp_path / "a" / "b" / ".git").is_dir()
        return
    with refused("repository" if force else "is no earlier merge"):
        merge(recipe, tmp_path / out, force=force)
    with refused("repository"):
        merge(recipe, tmp_path / "a" / "b" / ".git", force=force)
    assert file_hashes(tmp_path) == before


@forced
@pytest.mark.parametrize("out", [".", "here", "../here", "..", "/", "~"])
def test_the_current_folder_and_what_holds_it_are_not_replaced(out, force, recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    merge(recipe, tmp_path / "here" / "below")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    place = {"here": tmp_path / "here", "~": tmp_path / "home"}.get(out, Path(out))
    before = file_hashes(tmp_path)
    with refused("choose another place"):
        merge(recipe, place, force=force)
    assert file_hashes(tmp_path) == before


@forced
@pytest.mark.parametrize("out", ["file", "folder.safetensors"])
def test_a_file_does_not_become_a_folder_nor_a_folder_a_file(out, force, recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    with refused(out):
        merge(recipe, tmp_path / out, force=force)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "folder.safetensors").is_dir()


@pytest.mark.parametrize("out", ["nul\0", "/proc/out", "/proc/out.safetensors", ".x.partial"])
def test_a_name_that_cannot_be_is_refused(out, recipe, tmp_path):
    with refused("choose another"):
        merge(recipe, tmp_path / out)


# --------------------------------------------------------------------------------------- staging folders


def test_a_staging_folder_that_is_a_link_is_not_followed(recipe, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / ".out.partial").symlink_to("thesis")
    for write in WRITES.values():
        with refused(".out.partial: is a link"):
            write(recipe, tmp_path / "out")
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"
    assert (tmp_path / ".out.partial").is_symlink()


def test_a_folder_of_the_users_by_that_name_is_kept(recipe, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "chapter").write_text("years of work")
    with refused(".out.partial: holds 'chapter'"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "chapter").read_text() == "years of work"
    (tmp_path / ".b.partial").write_text("a file")
    with refused(".b.partial: is no folder"):
        merge(recipe, tmp_path / "b")
    assert (tmp_path / ".b.partial").read_text() == "a file"


@pytest.mark.parametrize("removed", [".", "out", "out/model.safetensors"])
@pytest.mark.parametrize("out", ["out", "x.safetensors"])
def test_what_is_removed_while_it_is_made_is_not_blamed_on_the_place(removed, out, recipe, tmp_path):
    """The place is good: to choose another one mends nothing, whether somebody removed it or the fault is ours."""
    staging = staging_of(tmp_path / out)

    def remove_once_written(done: int, total: int) -> None:
        if done == total:
            remove(staging / removed)

    with refused(str(staging), f"went away while {tmp_path / out} was written; run again"):
        merge(recipe, tmp_path / out, progress=remove_once_written)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    merge(recipe, tmp_path / out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_another_users_staging_folder_is_not_taken(recipe, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    os.chown(tmp_path / ".out.partial", 65534, 65534)
    with refused(".out.partial: belongs to another user"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / ".out.partial").stat().st_uid == 65534


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_merges_of_names_that_resemble_each_other_do_not_meet(suffix, recipe, tmp_path):
    """What stood at one place is put away under no name that another place makes its output under."""
    out, other = tmp_path / f"x{suffix}", tmp_path / f"x{suffix}.old{suffix}"
    merge(recipe, out)

    def meanwhile(done: int, total: int) -> None:
        if done == 1:
            merge({**recipe, "method": "ties"}, out)

    merge(recipe, other, progress=meanwhile)
    assert not staging_of(out).exists() and not staging_of(other).exists()
    merge({**recipe, "method": "ties"}, tmp_path / f"y{suffix}")
    assert file_hashes(out).keys() == file_hashes(tmp_path / f"y{suffix}").keys()


def test_a_hard_link_in_the_staging_folder_is_not_written_through(recipe, tmp_path):
    """As what stood at the place, linked to a cache, may lie there after a kill."""
    merge(recipe, tmp_path / "out")
    cached = tmp_path / "cached"
    os.link(tmp_path / "out" / "model.safetensors", cached)
    before = cached.read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge({**recipe, "method": "ties"}, tmp_path / "out", progress=stop)
    shutil.rmtree(tmp_path / ".out.partial" / "out")
    (tmp_path / "out").rename(tmp_path / ".out.partial" / "out")
    (tmp_path / ".out.partial" / "out" / "stale.json").write_text("{}")
    merge({**recipe, "method": "ties"}, tmp_path / "out")
    assert cached.read_bytes() == before
    assert not (tmp_path / "out" / "stale.json").exists()


# --------------------------------------------------------------------------------------- sweeps and the command line


def test_a_sweep_keeps_what_is_not_its_own(recipe, tmp_path):
    grid, ties = {"scale": [1.0, 2.0]}, {**recipe, "method": "ties"}
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "sweep.json").write_text('{"mine": 1}')
    with refused("sweep.json", "is no sweep of Mergeline's"):
        sweep(ties, grid, out)
    assert sorted(p.name for p in out.iterdir()) == ["sweep.json"]
    (out / "sweep.json").unlink()
    (out / "notes.txt").write_text("mine")  # beside the points
    names = [row["folder"] for row in sweep(ties, grid, out)]
    sweep(ties, grid, out)
    (out / names[1] / "notes.txt").write_text("mine")
    with refused(names[1], "notes.txt"):
        sweep(ties, grid, out)
    sweep(ties, grid, out, force=True)
    assert not (out / names[1] / "notes.txt").exists() and (out / "notes.txt").exists()


def words(recipe: Recipe) -> list[Any]:
    experts = [part for name, path in recipe["experts"].items() for part in ("--expert", f"{name}={path}")]
    return ["--base", recipe["base"], *experts]


def test_the_command_line_names_what_was_replaced(recipe, tmp_path, mergeline):
    given = ["merge", "--method", "cart", *words(recipe), "--out", tmp_path / "out"]
    first = mergeline(*given)
    assert first.code == 0 and "replaced" not in first.err
    again = mergeline(*given)
    assert again.code == 0 and again.out == first.out
    assert f"note: {tmp_path / 'out'} replaced the merge by cart of base, a, b, c\n" in again.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    refusal = mergeline(*given[:-1], tmp_path / "mine")
    assert refusal.code == 2 and "--force" in refusal.err and "replaced" not in refusal.err
    forced = mergeline(*given[:-1], tmp_path / "mine", "--force")
    assert forced.code == 0 and "mine replaced what was there\n" in forced.err


def test_every_command_that_writes_names_what_it_replaced(recipe, tmp_path, mergeline):
    commands = {
        "the store by tall_mask of base, a, b, c": ["compress", "--method", "tall_mask", *words(recipe)],
        "the expert a of compress": ["extract-expert", tmp_path / "compress", "a"],
        "the adapter by average of base, a": ["extract-lora", *words(recipe)[:4], "--rank", "1"],
        "the merge by ties of base, a, b, c": [
            "sweep",
            "--method",
            "ties",
            *words(recipe),
            "--grid",
            "scale=1",
        ],
    }
    for what, given in commands.items():
        out = tmp_path / given[0]
        assert mergeline(*given, "--out", out).code == 0
        again = mergeline(*given, "--out", out)
        assert again.code == 0 and f" replaced {what}\n" in again.err, again


def test_the_file_of_a_recipe_is_not_replaced(recipe, tmp_path, mergeline):
    out = tmp_path / "out"
    out.mkdir()
    paths = {name: str(path) for name, path in recipe["experts"].items()}
    (out / "recipe.yaml").write_text(json.dumps({"method": "average", "experts": paths}))
    for force in ([], ["--force"]):
        outcome = mergeline("merge", "--recipe", out / "recipe.yaml", "--out", out, *force)
        assert outcome.code == 2 and "holds the input" in outcome.err
    assert (out / "recipe.yaml").exists()


def test_a_page_replaces_pages_alone(recipe, tmp_path, mergeline):
    page = tmp_path / "page.html"
    given = ["inspect", *words(recipe), "--html"]
    assert mergeline(*given, page).code == 0
    assert mergeline(*given, page).code == 0
    page.write_text("<html>my thesis</html>")
    outcome = mergeline(*given, page)
    assert outcome.code == 2 and "is no page of Mergeline's" in outcome.err
    assert page.read_text() == "<html>my thesis</html>"
    assert mergeline(*given, page, "--force").code == 0
    before = file_hashes(tmp_path / "in")
    for out in ("a.safetensors", "base/model.safetensors", "b/part-1.safetensors"):
        for force in ([], ["--force"]):
            outcome = mergeline(*given, tmp_path / "in" / out, *force)
            assert outcome.code == 2 and "holds the input" in outcome.err
    assert mergeline(*given, tmp_path / "in").code == 2
    assert file_hashes(tmp_path / "in") == before
