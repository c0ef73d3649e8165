"""Fuzzed headers and shard indexes: read or refused in one line, without a traceback, a hang, or a write elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from checkpoints import random_state, save_family, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from soon import soon

from mergeline.merging.checkpoints.checkpoint import DTYPES, open_checkpoint
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.errors import UserError

HEADERS, INDEXES = 750, 250
OTHERS = st.sampled_from(["inspect", "diff", "plan"])
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# --------------------------------------------------------------------------------------- what is fuzzed

NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.sampled_from([2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64, 2**64 - 8, 10**30, 10**400, -(2**63)]),
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.one_of(
    st.sampled_from(
        ["__metadata__", "", "a\nb", "\x1b[2J", "\0", "../../x", "w" * 3000, "blocks.99999999999.w"]
    ),
    st.text(st.characters(), max_size=6),
)
ENTRY_CHANGES = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from([*DTYPES, "F4", "f32", ""]) | JUNK),
    st.tuples(st.sampled_from(["shape", "data_offsets"]), st.lists(NUMBERS, max_size=4) | JUNK),
    st.tuples(NAMES, JUNK),
)
TENSORS = sorted(random_state(0))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file of which some things were changed."""
    whole = save(random_state(1))
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    text = None
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(["entry", "swap", "rename", "replace", "remove", "twice", "nested", "data"])
        )
        name = draw(st.sampled_from(TENSORS))
        if kind == "data":
            data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=8))
        elif kind == "twice":
            text = json.dumps(header)[:-1] + "," + json.dumps({name: draw(JUNK)})[1:]
        elif kind == "nested":
            depth = draw(st.sampled_from([2, 50, 5000, 50_000]))
            text = json.dumps(header)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        elif kind == "replace":
            header[name] = draw(JUNK)
        elif kind == "remove":
            header.pop(name, None)
        elif kind == "rename" and name in header:
            header[draw(NAMES)] = header.pop(name)
        elif kind == "swap":
            other = draw(st.sampled_from(TENSORS))
            header[name], header[other] = header.get(other), header.get(name)
        elif kind == "entry" and isinstance(header.get(name), dict):
            key, value = draw(ENTRY_CHANGES)
            header[name][key] = value
    raw = (json.dumps(header) if text is None else text).encode()
    length = draw(NUMBERS) if rarely(draw) else len(raw)
    return damaged(draw, (length % 2**64).to_bytes(8, "little") + raw + data)


def rarely(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 7)) == 7


def damaged(draw: st.DrawFn, file: bytes) -> bytes:
    """The file, rarely with some bytes of its beginning changed, or cut short."""
    if rarely(draw):
        changed = bytearray(file)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, min(len(file), 400) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    return file[: draw(st.integers(0, len(file)))] if rarely(draw) else file


FILES = st.one_of(
    st.sampled_from(["part-0.safetensors", "part-1.safetensors"]),
    st.sampled_from(
        [
            "../secret.safetensors", "../../secret.safetensors", "/etc/passwd", "..", ".", "",
            "link.safetensors", "folder.safetensors", INDEX, "part-0.safetensors/", "./part-0.safetensors",
            "a\\b", "nul\0", "x" * 300, "a\nb", "\ud800",
        ]
    ),
    JUNK,
)  # fmt: skip


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """The shard index of a checkpoint of which some things were changed."""
    weight_map: Any = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(random_state(0))}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(TENSORS) | NAMES)
        if draw(st.booleans()):
            weight_map[name] = draw(FILES)
        else:
            weight_map.pop(name, None)
    index = {"metadata": {}, "weight_map": draw(JUNK) if rarely(draw) else weight_map}
    return damaged(draw, json.dumps(draw(JUNK) if rarely(draw) else index).encode())


# --------------------------------------------------------------------------------------- what is watched

# Audit events that change the disk, and how many of their arguments are paths.
_CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1} | dict.fromkeys(
    ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.mkfifo"), 1
)
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watched: list[list[str]] = []  # where the changes are noted; an audit hook cannot be removed


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watched or event != "open" and event not in _CHANGES:
        return
    if event == "open" and not args[2] & _OPEN_TO_WRITE:
        return
    if event in ("os.remove", "os.rmdir") and args[1] != -1:  # below a folder that shutil.rmtree was given
        return
    for path in args[: _CHANGES.get(event, 1)]:
        if not isinstance(path, int):  # a file that is open already
            _watched[-1].append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """The block must end in time, and write nowhere but in `folder`."""
    written: list[str] = []
    _watched.append(written)
    try:
        with soon():
            yield
    finally:
        _watched.pop()
    allowed = (f"{folder.resolve()}/", "/dev/null")
    assert [path for path in written if not path.startswith(allowed)] == []


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`in/` with a family, `target/` to write to, and a secret that a path may lead to."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    save_family(tmp_path / "in")
    (tmp_path / "secret.safetensors").write_bytes(save(random_state(9)))
    (tmp_path / "target").mkdir()
    return tmp_path


def check_commands(mergeline: Callable[..., Any], sandbox: Path, fuzzed: Path, other: str) -> None:
    """A checkpoint is read or refused by `merge` and by another command."""
    target, files = sandbox / "target", sandbox / "in"
    shutil.rmtree(target / "out", ignore_errors=True)
    experts = [
        "--base",
        files / "base.safetensors",
        "--expert",
        files / "a.safetensors",
        "--expert",
        f"b={fuzzed}",
    ]
    with watched(target):
        try:
            open_checkpoint(fuzzed).digest()
            sound = True
        except UserError as error:
            assert "\n" not in str(error)
            sound = False
        commands = {
            "inspect": ["inspect", fuzzed],
            "diff": ["diff", fuzzed, files / "a.safetensors"],
            "plan": ["plan", "--method", "ties", *experts],
            "merge": ["merge", "--method", "ties", *experts, "--out", target / "out", "--workers", "1"],
        }
        for command in (commands[other], commands["merge"]):
            done = mergeline(*command)
            assert done.code in ((0, 2) if sound else (2,)), done
            errors = [line for line in done.err.splitlines() if not line.startswith("note: ")]
            assert len(errors) == (done.code == 2) and "Traceback" not in done.err, done
            assert all(line.startswith("mergeline: ") and line.isprintable() for line in errors), done
        assert (target / "out").exists() == (done.code == 0)
        assert [path.name for path in target.iterdir() if path.name != "out"] == []


# --------------------------------------------------------------------------------------- the tests


@pytest.mark.slow
@settings(FUZZ, max_examples=HEADERS)
@given(file=headers(), other=OTHERS)
def test_fuzzed_headers(file, other, sandbox, mergeline):
    fuzzed = sandbox / "in" / "fuzzed.safetensors"
    fuzzed.write_bytes(file)
    check_commands(mergeline, sandbox, fuzzed, other)


@pytest.mark.slow
@settings(FUZZ, max_examples=INDEXES)
@given(index=indexes(), other=OTHERS)
def test_fuzzed_indexes(index, other, sandbox, mergeline):
    fuzzed = sandbox / "in" / "fuzzed"
    if not fuzzed.exists():
        shard(load_file(sandbox / "in" / "b.safetensors"), fuzzed, 2)
        (fuzzed / "link.safetensors").symlink_to(sandbox / "secret.safetensors")
        (fuzzed / "folder.safetensors").mkdir()
    (fuzzed / INDEX).write_bytes(index)
    check_commands(mergeline, sandbox, fuzzed, other)


def test_writes_elsewhere_are_seen(tmp_path):
    (tmp_path / "target").mkdir()
    for write in (
        lambda: (tmp_path / "file").write_text("x"),
        lambda: (tmp_path / "target" / ".." / "folder").mkdir(),
        lambda: (tmp_path / "file").rename(tmp_path / "target" / "file"),
        lambda: shutil.rmtree(tmp_path / "folder"),
    ):
        with pytest.raises(AssertionError, match="folder|file"), watched(tmp_path / "target"):
            write()
    with watched(tmp_path / "target"):
        (tmp_path / "target" / "file").write_text("x")
        (tmp_path / "target" / "file").read_text()
