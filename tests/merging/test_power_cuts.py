"""A power cut at any moment leaves the old output or the new one, whole; so does a disk that fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from itertools import count
from pathlib import Path
from typing import Any, Callable

import pytest
from checkpoints import save_family
from power_cuts import Recording, recorded, tree_of, write_tree

from mergeline.merging import files, merge
from mergeline.merging.api import merge_points
from mergeline.merging.compress import compress, extract_expert
from mergeline.merging.engine.manifest import manifest_path
from mergeline.merging.errors import UserError
from mergeline.merging.extract_lora import extract_lora
from mergeline.merging.files import publish, resumable, staged, write_json
from mergeline.merging.verify import verify

Recipe = dict[str, Any]
Write = Callable[[Recipe, Path, bool], None]  # an output of a recipe into a folder: the first, or another
Output = dict[str, bytes]
MATRICES = {"blocks.0.attn.weight": (6, 4), "blocks.0.mlp.weight": (3, 5), "logit_scale": ()}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A base that is a folder with configuration and tokenizer, and two experts."""
    made = save_family(tmp_path / "in", experts=2, shapes=MATRICES)
    folder = tmp_path / "in" / "folder"
    folder.mkdir()
    made.pop("base").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "vocab_size": 5}))
    (folder / "tokenizer_config.json").write_text("{}")
    return {**made, "base": folder}


def merge_to(name: str, **options: Any) -> Write:
    def write(recipe: Recipe, folder: Path, again: bool) -> None:
        merge({**recipe, **options, "method": "ties" if again else "average"}, folder / name, workers=1)

    return write


def points_to(recipe: Recipe, folder: Path, again: bool) -> None:
    points = [({**recipe, "method": "ties", "params": {"scale": s + again}}, folder / str(s)) for s in (1, 2)]
    merge_points(points, workers=1)


def compress_to(name: str) -> Write:
    def write(recipe: Recipe, folder: Path, again: bool) -> None:
        compress(
            {**recipe, "method": "tall_mask", "params": {"threshold": 0.4 + again / 10}},
            folder / name,
            workers=1,
        )

    return write


def extract_to(name: str) -> Write:
    def write(recipe: Recipe, folder: Path, again: bool) -> None:
        store = folder.parent / "store"
        if not store.exists():
            compress({**recipe, "method": "tall_mask"}, store)
        extract_expert(store, "b" if again else "a", folder / name)

    return write


def lora_to(name: str) -> Write:
    def write(recipe: Recipe, folder: Path, again: bool) -> None:
        extract_lora(recipe, folder / name, rank=2 if again else 1, workers=1)

    return write


def results_to(recipe: Recipe, folder: Path, again: bool) -> None:
    """As the steps of the pipeline and the registry write."""
    write_json(folder / "state" / "verdict.json", {"passed": again})
    with staged(folder / "board") as partial:
        write_json(partial / "leaderboard.json", {"rows": [again]})
        write_json(partial / "metrics.json", {"mean": 0.5 + again})
        publish(partial, folder / "board")


WRITES = {
    "folder": merge_to("out"),
    "shards": merge_to("out", shard_size=100),
    "file": merge_to("out.safetensors"),
    "points": points_to,
    "store": compress_to("out"),
    "store file": compress_to("out.safetensors"),
    "expert": extract_to("out"),
    "expert file": extract_to("out.safetensors"),
    "adapter": lora_to("out"),
    "adapter file": lora_to("out.safetensors"),
    "results": results_to,
}
ONE = [write for name, write in WRITES.items() if name not in ("points", "results")]
SLOW = {"points": pytest.mark.slow}
every_write = pytest.mark.parametrize(
    "write", [pytest.param(write, id=name, marks=SLOW.get(name, ())) for name, write in WRITES.items()]
)


def outputs(folder: Path) -> list[Output]:
    """Every output in a folder: its files, or a single file with the manifest that is its; not what is unfinished."""
    found = []
    for path in sorted(
        p for p in folder.rglob("*") if not re.search(r"/\.", str(p.relative_to(folder.parent)))
    ):
        if path.is_dir():
            held = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name[0] != "."}
            found += [held] if held else []
        elif path.suffix == ".safetensors" and path.parent == folder:
            found.append({"weights": path.read_bytes(), "manifest": manifest_path(path).read_bytes()})
    return found


def writers_of(folder: Path) -> list[Path]:
    """The places whose staging folders lie in a folder."""
    return [
        p.with_name(p.name[1:].removesuffix(".partial")) for p in folder.rglob(".*.partial") if p.is_dir()
    ]


def prepared(write: Write, recipe: Recipe, folder: Path) -> list[Output]:
    """Make the folder with an earlier output in it."""
    folder.mkdir()
    write(recipe, folder, False)
    return outputs(folder)


def check_states(
    recording: Recording, cut: Path, old: list[Output], new: list[Output], at_once: bool = True
) -> None:
    """What any cut left is whole: at once, and when the next writer has taken the place. What was done stays."""
    assert new and new != old
    states = list(recording.states())
    assert len(states) > 10
    for state in states:
        write_tree(state, cut)
        if at_once:
            check_whole(cut, old, new)
        for out in writers_of(cut):
            with resumable(out):
                pass
        assert writers_of(cut) == []
        check_whole(cut, old, new)
        shutil.rmtree(cut)
    for state in recording.states(first=len(recording.changes)):
        write_tree(state, cut)
        assert outputs(cut) == new
        shutil.rmtree(cut)


def check_whole(folder: Path, old: list[Output], new: list[Output]) -> None:
    found = outputs(folder)
    assert len(found) >= len(old) and all(output in (*old, *new) for output in found)


@every_write
def test_a_power_cut_leaves_the_old_or_the_new(write, recipe, tmp_path):
    old = prepared(write, recipe, tmp_path / "place")
    with recorded(tmp_path / "place") as recording:
        write(recipe, tmp_path / "place", True)
    check_states(recording, tmp_path / "cut", old, outputs(tmp_path / "place"))


@every_write
def test_a_power_cut_leaves_nothing_or_the_new(write, recipe, tmp_path):
    (tmp_path / "place").mkdir()
    with recorded(tmp_path / "place") as recording:
        write(recipe, tmp_path / "place", True)
    check_states(recording, tmp_path / "cut", [], outputs(tmp_path / "place"))


@pytest.mark.parametrize("name", ["shards", "file", "results"])
def test_where_names_cannot_be_exchanged_the_next_writer_puts_the_old_back(name, recipe, tmp_path):
    write = WRITES[name]
    old = prepared(write, recipe, tmp_path / "place")
    with recorded(tmp_path / "place", exchange=False) as recording:
        write(recipe, tmp_path / "place", True)
    check_states(recording, tmp_path / "cut", old, outputs(tmp_path / "place"), at_once=False)


def test_what_a_cut_left_is_merged_again(recipe, tmp_path):
    """The staging folder of any moment is gone on with, or begun anew, to the same bytes."""
    write = WRITES["file"]
    prepared(write, recipe, tmp_path / "place")
    with recorded(tmp_path / "place") as recording:
        write(recipe, tmp_path / "place", True)
    expected = tree_of(tmp_path / "place")
    for state in list(recording.states())[::7]:
        write_tree(state, tmp_path / "cut")
        write(recipe, tmp_path / "cut", True)
        assert tree_of(tmp_path / "cut") == expected
        shutil.rmtree(tmp_path / "cut")


def test_a_manifest_that_a_cut_left_behind_is_found(recipe, tmp_path):
    """Between the renaming of a single file and that of its manifest, the file is the new one: so is its manifest."""
    out = tmp_path / "place" / "out.safetensors"
    prepared(WRITES["file"], recipe, tmp_path / "place")
    rename, renamed = Path.rename, []

    def cut(path: Path, target: Path) -> Any:
        if target.name.endswith("manifest.json"):
            raise KeyboardInterrupt
        renamed.append(target)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", cut)
        WRITES["file"](recipe, tmp_path / "place", True)
    assert out in renamed
    on_disk = out.with_name("out.safetensors.manifest.json")
    assert json.loads(on_disk.read_text())["recipe"]["method"] == "average"
    assert manifest_path(out) != on_disk
    assert json.loads(manifest_path(out).read_text())["recipe"]["method"] == "ties"
    assert "bit-identical" in verify(out)
    with resumable(out):
        pass
    assert manifest_path(out) == on_disk and "bit-identical" in verify(out)


# --------------------------------------------------------------------------------------- failing disks


@every_write
def test_a_sync_that_fails_publishes_nothing(write, recipe, tmp_path, monkeypatch):
    """Of several outputs those that came first may be there, each of them whole."""
    new = prepared(lambda *args: write(*args[:2], True), recipe, tmp_path / "new")
    old = prepared(write, recipe, tmp_path / "place")
    sync, failures = os.fsync, 0
    for number in count():
        calls = count()

        def failing(handle: int, calls: Any = calls, number: int = number) -> None:
            if next(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                write(recipe, tmp_path / "place", True)
                break
            except UserError as error:
                assert "the disk failed" in str(error) and "\n" not in str(error)
        failures += 1
        check_whole(tmp_path / "place", old, old if write in ONE else new)
        assert writers_of(tmp_path / "place") == []
    assert failures >= 4


def test_the_command_line_says_that_the_disk_failed(recipe, tmp_path, monkeypatch, mergeline):
    def failing(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    experts = [f"{name}={path}" for name, path in recipe["experts"].items()]
    words = [
        "--base",
        recipe["base"],
        "--expert",
        experts[0],
        "--expert",
        experts[1],
        "--out",
        tmp_path / "out",
    ]
    outcome = mergeline("merge", "--method", "average", *words)
    assert outcome.code == 2 and "the disk failed" in outcome.err and len(outcome.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


# --------------------------------------------------------------------------------------- the recorder


def test_what_was_not_synced_is_lost_in_some_state(tmp_path):
    """A file that is renamed before it is on the disk, as careless programs do."""
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file").write_bytes(b"old")
    with recorded(tmp_path / "place") as recording:
        (tmp_path / "place" / "new").write_bytes(b"fresh")
        (tmp_path / "place" / "new").rename(tmp_path / "place" / "file")
    states = list(recording.states())
    found = {state["file"] for state in states}
    assert found == {b"old", b"", b"\0\0\0\0\0", b"fr", b"fresh"}
    with recorded(tmp_path / "place") as recording:
        files.write_bytes(tmp_path / "place" / "file", b"third")
    assert {state["file"] for state in recording.states()} == {b"fresh", b"third"}


def test_a_change_that_is_not_seen_is_noticed(tmp_path):
    with pytest.raises(AssertionError), recorded(tmp_path):
        subprocess.run(["touch", tmp_path / "file"], check=True)
