"""A merge that was killed or interrupted goes on where it was, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter
from contextlib import suppress
from itertools import count, cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Callable

import pytest
from checkpoints import SHAPES, file_hashes, refused, save_family

from mergeline.merging import files, merge
from mergeline.merging.api import merge_points
from mergeline.merging.checkpoints.checkpoint import open_checkpoint
from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.methods import catalogue
from mergeline.merging.methods.bound import Bound

# Children are forked from a process that has imported what a merge needs, so that a kill costs little.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_resume", "torch", "scipy.linalg.blas", "blake3"])
catalogue()
PATIENCE = 120  # seconds until a child that does nothing is a failure

ELEMENTWISE = {f"blocks.{i}.weight": (500, 600) for i in range(12)}
MATRICES = {f"blocks.{i}.weight": (160 + i, 180) for i in range(20)}
FINISHED = 3  # tensors of four, before an interruption
KILLS = int(os.environ.get("KILLS", "48"))
MERGES = {
    "ties": (ELEMENTWISE, {}),  # a pre-pass of two readings
    "dare": (ELEMENTWISE, {"drop_rate": 0.5}),
    "sce": (ELEMENTWISE, {"density": 0.5}),
    "karcher": (ELEMENTWISE, {}),
    "lines": (ELEMENTWISE, {"inner": "ties"}),  # a pre-pass that merges the whole model
    "cart": (MATRICES, {}),
    "tsv_merge": (MATRICES, {}),
    "iso_c": (MATRICES, {}),
}


def journal_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial") / "journal.jsonl"


def journaled(out: Path) -> set[str]:
    """The tensors that have a whole line in the journal."""
    found = set()
    if journal_of(out).exists():
        for line in journal_of(out).read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError, KeyError):
                found.add(json.loads(line)["tensor"])
    return found


def log_begun(path: Path, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on, the name of every tensor that a merge begins becomes a line of `path`."""
    begin = CheckpointWriter.open

    def logged(writer: CheckpointWriter, name: str) -> Any:
        with open(path, "a") as log:
            log.write(f"{name}\n")
        return begin(writer, name)

    patch(CheckpointWriter, "open", logged)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The tensors that merges of this process began since it was last called."""
    log = tmp_path / "begun"
    log_begun(log, monkeypatch.setattr)

    def since() -> list[str]:
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    return since


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """TIES, which has a pre-pass, on four tensors."""
    return save_family(tmp_path / "in", method="ties")


# --------------------------------------------------------------------------------------- kills


def merge_in_child(log: Path, ready: Any, recipe: dict[str, Any], out: Path, options: dict[str, Any]) -> None:
    log_begun(log)
    ready.set()
    merge(recipe, out, **options)


def start_child(log: Path, recipe: dict[str, Any], out: Path, **options: Any) -> BaseProcess:
    """A child that is about to merge."""
    ready = FORK.Event()
    child = FORK.Process(target=merge_in_child, args=(log, ready, recipe, out, options))
    child.start()
    assert ready.wait(PATIENCE)
    return child


class Kills:
    """Merges that are killed again and again until they are done, and what came of it."""

    def __init__(self, folder: Path, recipes: dict[str, dict[str, Any]], seed: int):
        self.folder, self.recipes, self.draw = folder, recipes, random.Random(seed)
        self.log = folder / "begun"
        self.count: Counter[str] = Counter()
        self.redone = {1: 0, 2: 0}  # workers -> the most tensors that a merge began again
        self.seconds, self.expected = {}, {}
        for method, recipe in recipes.items():
            child = start_child(self.log, recipe, folder / "undisturbed" / method, workers=1)
            begin = monotonic()
            child.join()
            self.seconds[method] = monotonic() - begin
            self.expected[method] = file_hashes(folder / "undisturbed" / method)

    def kill_until_done(self, method: str, most: int) -> None:
        """Kill a merge at random moments, at most so many times, then let it finish."""
        out, everything = self.folder / "killed" / method, set(MERGES[method][0])
        workers = self.draw.choice((1, 2))
        finished: set[str] = set()
        in_flight: set[str] = set()
        while not out.exists():
            self.log.write_text("")
            child = start_child(self.log, self.recipes[method], out, workers=workers)
            if most:
                sleep(self.draw.random() * self.seconds[method])
                child.kill()
            child.join()
            begun = self.log.read_text().split()
            assert not finished & set(begun), "a finished tensor was merged again"
            self.redone[workers] = max(self.redone[workers], len(in_flight & set(begun)))
            if child.exitcode == -signal.SIGKILL:
                most -= 1
                self.count["kills"] += 1
                finished = journaled(out)
                in_flight = set(begun) - finished
                self.count[self.moment(out, begun, finished >= everything)] += 1
            else:
                assert child.exitcode == 0
                assert finished | set(begun) == everything
        assert file_hashes(out) == self.expected[method]
        shutil.rmtree(self.folder / "killed")

    @staticmethod
    def moment(out: Path, begun: list[str], complete: bool) -> str:
        if out.exists():
            return "after it appeared"
        if complete:
            return "after the last tensor"
        return "among the tensors" if begun else "before a tensor"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The recipes of MERGES."""
    elementwise = save_family(tmp_path_factory.mktemp("elementwise"), shapes=ELEMENTWISE)
    matrices = save_family(tmp_path_factory.mktemp("matrices"), shapes=MATRICES)
    return {
        method: {**(matrices if shapes is MATRICES else elementwise), "method": method, "params": params}
        for method, (shapes, params) in MERGES.items()
    }


def kill_at_random_moments(recipes: dict[str, dict[str, Any]], total: int, folder: Path) -> Kills:
    """So many kills or more, of which a quarter or more hit a merge that is writing."""
    kills, methods = Kills(folder, recipes, seed=total), cycle(recipes)
    while kills.count["kills"] < total or kills.count["among the tensors"] < total // 4:
        kills.kill_until_done(next(methods), most=total // len(recipes))
    assert all(most <= workers for workers, most in kills.redone.items())
    return kills


@pytest.mark.slow
def test_kill_at_random_moments(families, tmp_path, capsys):
    kills = kill_at_random_moments(families, KILLS, tmp_path)
    with capsys.disabled():
        print(f"\n{dict(kills.count)}; most tensors redone, by workers: {kills.redone}")


CHANGES = (
    "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "mkdir", "link", "rename", "unlink", "rmdir",
)  # fmt: skip


def merge_until_change(number: int, recipe: dict[str, Any], out: Path) -> None:
    """Merge, and be killed at the given change to the disk: half-way through a write, before any other."""
    counter = count()

    def changing(module: Any, name: str) -> None:
        change = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(counter) == number:
                if name in ("write", "pwrite"):
                    change(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        setattr(module, name, counted)

    for name in CHANGES:
        changing(os, name)
    changing(files, "exchange")
    merge(recipe, out, workers=1)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_every_change_to_the_disk(every, recipe, begun, tmp_path):
    """The output replaces an earlier one, and is that or the new one at every moment."""
    before = tmp_path / "before" / "out"
    merge({**recipe, "method": "average"}, before)
    merge(recipe, tmp_path / "expected" / "out")
    old, new = file_hashes(before), file_hashes(tmp_path / "expected" / "out")
    begun()
    for number in count(step=every):
        out = tmp_path / "killed" / "out"
        shutil.copytree(before, out)
        child = FORK.Process(target=merge_until_change, args=(number, recipe, out))
        child.start()
        child.join(PATIENCE)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        state = file_hashes(out)
        assert state in (old, new)
        finished = journaled(out) if state != new else set()
        merge(recipe, out, workers=1)
        assert set(begun()) == set(SHAPES) - finished
        assert file_hashes(out) == new
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)
    assert number > 4 * len(SHAPES)


# --------------------------------------------------------------------------------------- interruptions


def interrupt(
    *points: tuple[dict[str, Any], Path], after: int = FINISHED, error: Any = KeyboardInterrupt
) -> set[str]:
    """Merge until so many tensors were finished; the names of all that are."""
    begin, counter = CheckpointWriter.open, count()

    def stop(writer: CheckpointWriter, name: str) -> Any:
        if next(counter) >= after * len(points):
            raise error
        return begin(writer, name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(CheckpointWriter, "open", stop)
        merge_points(points, workers=1)
    assert all(journaled(out) == journaled(points[0][1]) for _, out in points)
    return journaled(points[0][1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_interrupted_merge_goes_on(error, out, recipe, begun, tmp_path):
    merge(recipe, tmp_path / "expected" / out)
    begun()
    finished = interrupt((recipe, tmp_path / "again" / out), error=error)
    assert set(begun()) == finished and len(finished) == FINISHED
    seen = []
    merge(recipe, tmp_path / "again" / out, progress=lambda *counts: seen.append(counts))
    assert set(begun()) == set(SHAPES) - finished
    assert seen[0] == (len(finished) + 1, len(SHAPES)) and seen[-1] == (len(SHAPES), len(SHAPES))
    assert {size.bytes for size in seen[-1]} == {make_plan(recipe).bytes_read}  # what was there counts
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def test_what_was_finished_while_the_caller_was_busy_is_kept(recipe, begun, tmp_path):
    """Who merges a tensor journals it, not who waits for it."""

    def busy(done: int, total: int) -> None:
        deadline = monotonic() + PATIENCE
        while len(journaled(tmp_path / "out")) < total and monotonic() < deadline:
            sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", workers=1, progress=busy)
    assert set(begun()) == set(SHAPES)
    merge(recipe, tmp_path / "out")
    assert begun() == []


def test_a_pre_pass_is_not_repeated(recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "expected" / "out")
    interrupt((recipe, tmp_path / "again" / "out"))
    monkeypatch.setattr(Bound, "look_at_model", None)
    merge(recipe, tmp_path / "again" / "out")
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def test_an_interrupted_pre_pass(recipe, begun, tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bound, "look_at_model", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out")
    assert begun() == [] and journal_of(tmp_path / "out").exists()
    merge(recipe, tmp_path / "out")
    assert set(begun()) == set(SHAPES)


def test_workers_memory_and_factors_may_change(recipe, begun, tmp_path):
    recipe = {**recipe, "method": "cart"}
    merge(recipe, tmp_path / "expected" / "out")
    finished = interrupt((recipe, tmp_path / "again" / "out"))
    begun()
    merge(recipe, tmp_path / "again" / "out", workers=3, memory=1 << 30, factors=tmp_path / "factors")
    assert set(begun()) == set(SHAPES) - finished
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def touch(recipe: dict[str, Any]) -> dict[str, Any]:
    os.utime(recipe["experts"]["b"])
    return recipe


def change_expert(recipe: dict[str, Any]) -> dict[str, Any]:
    """In place, and with the same time of modification."""
    path = recipe["experts"]["b"]
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return recipe


def exchange(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "experts": dict(reversed(recipe["experts"].items()))}


@pytest.mark.parametrize(
    "change",
    [
        touch,
        change_expert,
        exchange,
        lambda recipe: {**recipe, "method": "task_arithmetic"},
        lambda recipe: {**recipe, "params": {"density": 0.5}},
        lambda recipe: {**recipe, "dtype": "bfloat16"},
        lambda recipe: {**recipe, "seed": 1},
        lambda recipe: {**recipe, "shard_size": 100},
        lambda recipe: {**recipe, "exclude": "*scale"},
        lambda recipe: {**recipe, "rules": [{"params": {"scale": 2.0}}]},
    ],
    ids=["touched", "expert", "order", "method", "params", "dtype", "seed", "shards", "exclude", "rules"],
)
def test_another_merge_begins_anew(change, recipe, begun, tmp_path):
    interrupt((recipe, tmp_path / "again" / "out"))
    begun()
    recipe = change(recipe)
    merge(recipe, tmp_path / "again" / "out")
    assert set(begun()) == set(SHAPES)
    merge(recipe, tmp_path / "expected" / "out")
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def test_points_of_a_sweep_go_on(recipe, begun, tmp_path):
    points = [({**recipe, "params": {"density": d}}, tmp_path / "all" / str(d)) for d in (0.2, 0.5)]
    finished = interrupt(*points)
    begun()
    merge_points(points)
    assert set(begun()) == set(SHAPES) - finished
    for point, out in points:
        merge(point, tmp_path / "single" / out.name)
    assert file_hashes(tmp_path / "all") == file_hashes(tmp_path / "single")


def test_another_process_waits_its_turn(recipe, begun, tmp_path):
    """While a merge runs nobody else may write there; when it is killed, the next one goes on."""
    out = tmp_path / "out"
    child = FORK.Process(target=merge_and_hang, args=(recipe, out))
    child.start()
    deadline = monotonic() + PATIENCE
    while len(journaled(out)) < FINISHED and monotonic() < deadline:
        sleep(0.01)
    with refused("another process is writing"):
        merge(recipe, out)
    assert begun() == []
    child.kill()
    child.join()
    finished = journaled(out)
    assert len(finished) == FINISHED
    merge(recipe, out)
    assert set(begun()) == set(SHAPES) - finished


def merge_and_hang(recipe: dict[str, Any], out: Path) -> None:
    """Merge FINISHED tensors, then do nothing."""
    begin, counter = CheckpointWriter.open, count()

    def hang(writer: CheckpointWriter, name: str) -> Any:
        if next(counter) == FINISHED:
            sleep(PATIENCE)
        return begin(writer, name)

    CheckpointWriter.open = hang
    merge(recipe, out, workers=1)


# --------------------------------------------------------------------------------------- damage


def cut_last_line(staging: Path) -> None:
    journal = staging / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])


def add_rubbish(staging: Path) -> None:
    """What a power cut may leave behind."""
    with open(staging / "journal.jsonl", "ab") as journal:
        journal.write(b'[]\n7\n{}\n\xff\xfe\n{"tensor": "blocks' + b"\0" * 100)


def change_a_byte(staging: Path) -> None:
    """In the last tensor that was finished."""
    last = journal_lines(staging)[-1]["tensor"]
    info = open_checkpoint(staging / "out").tensors[last]
    data = bytearray(info.file.read_bytes())
    data[info.stop - 1] ^= 1
    info.file.write_bytes(data)


def damage_header(staging: Path) -> None:
    with open(staging / "out" / "model.safetensors", "r+b") as file:
        file.seek(20)
        file.write(b"?")


def journal_lines(staging: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (staging / "journal.jsonl").read_text().splitlines() if line]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (cut_last_line, 1),
        (add_rubbish, 0),
        (change_a_byte, 1),
        (damage_header, FINISHED),
        (lambda staging: os.truncate(staging / "out" / "model.safetensors", 700), FINISHED),
        (lambda staging: (staging / "out" / "model.safetensors").unlink(), FINISHED),
        (lambda staging: shutil.rmtree(staging / "out"), FINISHED),
        (lambda staging: (staging / "journal.jsonl").unlink(), FINISHED),
        (lambda staging: (staging / "journal.jsonl").write_bytes(b""), FINISHED),
        (lambda staging: (staging / "journal.jsonl").write_bytes(b"\0" * 500), FINISHED),
    ],
    ids=["line", "rubbish", "byte", "header", "end", "file", "folder", "journal", "lines", "zeros"],
)
def test_what_was_damaged_is_done_again(damage, lost, recipe, begun, tmp_path):
    merge(recipe, tmp_path / "expected" / "out")
    out = tmp_path / "again" / "out"
    interrupt((recipe, out))
    begun()
    damage(journal_of(out).parent)
    merge(recipe, out)
    assert len(begun()) == len(SHAPES) - FINISHED + lost
    assert file_hashes(tmp_path / "expected") == file_hashes(tmp_path / "again")


def test_what_follows_a_cut_line_counts(recipe, tmp_path):
    out = tmp_path / "out"
    interrupt((recipe, out), after=2)
    cut_last_line(journal_of(out).parent)
    assert len(journaled(out)) == 1
    assert len(interrupt((recipe, out), after=1)) == 2
