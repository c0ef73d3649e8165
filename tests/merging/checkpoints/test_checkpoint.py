"""Reading checkpoints: what a file says about itself is checked before it is believed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ODD_TENSORS, random_state, refused, same_tensors, shard, write_raw
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mergeline.merging.checkpoints.checkpoint import Files, open_checkpoint
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.errors import UserError
from mergeline.merging.reading import safe_name

STATE = random_state(0)


def entry(start: int = 0, stop: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, stop],
    }


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("state", [STATE, ODD_TENSORS, {}], ids=["plain", "odd", "nothing"])
def test_reads_what_the_safetensors_library_writes(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert same_tensors({name: checkpoint.read(name) for name in checkpoint.tensors}, state)
    assert list(checkpoint.tensors) == sorted(state)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.nbytes == sum(t.nbytes for t in state.values())


def test_what_is_read_is_a_copy(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    checkpoint.read("blocks.1.bias").zero_()
    assert torch.equal(checkpoint.read("blocks.1.bias"), STATE["blocks.1.bias"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch.safetensors"])
def test_a_folder_with_one_file(name, tmp_path):
    save_file(STATE, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    assert same_tensors({n: checkpoint.read(n) for n in checkpoint.tensors}, STATE)


def test_shards(tmp_path):
    checkpoint = open_checkpoint(shard(STATE, tmp_path / "shards", 3))
    assert same_tensors({n: checkpoint.read(n) for n in checkpoint.tensors}, STATE)
    assert list(checkpoint.tensors) == sorted(STATE)


@pytest.mark.parametrize("read", [lambda c: c.read("w"), lambda c: c.digest()], ids=["read", "digest"])
def test_a_file_that_shrinks_after_it_was_opened(read, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-4])
    with refused("x.safetensors", "'w'"):
        read(checkpoint)


@pytest.mark.parametrize("piece", [100_001, 1 << 20, 6_000_000])
def test_a_file_is_read_ahead(piece, tmp_path, monkeypatch):
    """Every stretch is asked for once, before it is read and not with it, and none is far ahead."""
    mib, asked = 1 << 20, []

    def advised(handle: int, start: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.extend(range(start, start + size, mib))

    monkeypatch.setattr(os, "posix_fadvise", advised)
    save_file({"a": torch.zeros(20 * mib, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    info = open_checkpoint(tmp_path / "a.safetensors").tensors["a"]
    with Files() as files:
        for start in range(0, 20 * mib, piece):
            stop = min(start + piece, 20 * mib)
            before = len(asked)
            files.elements(info, start, stop)
            assert all(0 <= step - (info.start + stop) < 4 * mib for step in asked[before:])
            assert not asked or asked[-1] >= info.start + stop + 3 * mib
    assert len(asked) == len({*asked}) and asked == sorted(asked)
    if piece < 4 * mib:  # between larger ones the kernel reads the rest
        assert asked == list(range(asked[0], asked[-1] + 1, mib)) and asked[0] < info.start + 5 * mib


# --------------------------------------------------------------------------------------- digests


def test_the_digest_depends_on_the_tensors_alone(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"a": "b"})
    digest = open_checkpoint(tmp_path / "a.safetensors").digest()
    backwards = dict(reversed(STATE.items()))
    data, header, stop = b"", {}, 0
    for name, tensor in backwards.items():  # an order that the library would not choose
        raw = tensor.numpy().tobytes()
        header[name] = entry(stop, stop + len(raw), tuple(tensor.shape))
        data, stop = data + raw, stop + len(raw)
    others = [
        write_raw(tmp_path / "b.safetensors", header, data),
        shard(STATE, tmp_path / "two", 2),
        shard(backwards, tmp_path / "four", 4),
    ]
    assert {open_checkpoint(path).digest() for path in others} == {digest}
    assert digest.startswith("sha256:") and len(digest) == 71


@pytest.mark.parametrize(
    "changed",
    [
        {**STATE, "blocks.1.bias": STATE["blocks.1.bias"] + 1},
        {**STATE, "logit_scale": STATE["logit_scale"].reshape(1)},
        {**STATE, "blocks.1.bias": STATE["blocks.1.bias"].view(torch.int32)},
        {**{k: v for k, v in STATE.items() if k != "logit_scale"}, "scale": STATE["logit_scale"]},
        {**STATE, "more": torch.zeros(0)},
    ],
    ids=["value", "shape", "dtype", "name", "tensor"],
)
def test_the_digest_changes_with_anything_of_a_tensor(changed, tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    save_file(changed, tmp_path / "b.safetensors")
    assert (
        open_checkpoint(tmp_path / "a.safetensors").digest()
        != open_checkpoint(tmp_path / "b.safetensors").digest()
    )


# --------------------------------------------------------------------------------------- malformed files


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 60, -1, -30])
def test_truncated(keep, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(STATE)[:keep])
    with refused("x.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [1_000, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(length, tmp_path):
    with refused("header does not fit"):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", {"w": entry()}, b"\0" * 8, length))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"v": entry(), "w": entry(4, 12)}, "overlaps"),
        ({"v": entry(), "w": entry()}, "overlaps"),
        ({"w": entry(8, 16)}, "hole"),
        ({"v": entry(0, 4, (1,)), "w": entry(8, 16)}, "hole"),
        ({"w": entry(0, 4, (1,))}, "longer than its header"),
        ({"w": entry(0, 400, (100,))}, "truncated"),
        ({"w": entry(0, 8, (3,))}, "do not hold"),
        ({"w": entry(8, 0)}, "do not hold"),
        ({"w": entry(dtype="F31")}, "unknown dtype 'F31'"),
        ({"w": entry(dtype=["F32"])}, "unknown dtype"),
        ({"w": entry(shape=(-2,))}, "malformed shape"),
        ({"w": entry(shape=(-1, -2))}, "malformed shape"),
        ({"w": entry(-8, 0)}, "malformed shape or offsets"),
        ({"w": entry(shape=(2.0,))}, "malformed shape"),
        ({"w": entry(shape=(True, 2))}, "malformed shape"),
        ({"w": entry(shape=(1 << 62,))}, "malformed shape"),
        ({"w": entry(0, 0, (1 << 61, 1 << 61))}, "do not hold"),
        ({"w": entry(0, 0, (1 << 61, 0))}, "no elements"),
        ({"w": entry(shape=2)}, "malformed shape"),
        ({"w": {**entry(), "data_offsets": [0]}}, "do not hold"),
        ({"w": {**entry(), "data_offsets": [0, 8, 8]}}, "do not hold"),
        ({"w": {**entry(), "data_offsets": None}}, "malformed"),
        ({"w": {**entry(), "more": 1}}, "malformed entry"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "malformed entry"),
        ({"w": [0, 8]}, "malformed entry"),
        ({"w": entry(), "__metadata__": {"a": 1}}, "__metadata__"),
        ({"w": entry(), "__metadata__": None}, "__metadata__"),
        ([1, 2], "not a JSON object"),
        (b"not json", "malformed"),
        (b"", "malformed"),
        (b'{"w": ', "malformed"),
        (b"\xff\xfe{}", "malformed"),
        ('{"w": "ä"}'.encode("latin-1"), "malformed"),
        (json.dumps({"w": entry()}).encode("utf-16"), "malformed"),
        (rb'{"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "malformed"),
        (b"[" * 100_000, "malformed"),
        (b'{"w":' * 100_000, "malformed"),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b'], "data_offsets": [0, 8]}}', "malformed"),
        (b'{"w": 1, "w": 2}', "twice"),
        (b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "twice"),
    ],
)
def test_malformed_headers(header, reason, tmp_path):
    with refused("x.safetensors", reason):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", header, b"\0" * 8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.lists(st.integers(-2, 24) | st.just(1 << 61) | JSON, max_size=3) | JSON
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E5M2", "X"]),
        "shape": NUMBERS,
        "data_offsets": NUMBERS,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3)


@given(
    header=HEADERS.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=60), data=st.binary(max_size=24)
)
@example(header=json.dumps({"w": entry(0, 0, (0, 1 << 61, 1 << 61))}).encode(), data=b"")
def test_any_header_is_read_or_refused(header, data, tmp_path_factory):
    path = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.digest()
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except UserError as error:
        assert "\n" not in str(error)


@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_any_damaged_byte_is_read_or_refused(position, byte, tmp_path_factory):
    whole = bytearray(save(STATE))
    whole[position] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(whole)
    try:
        open_checkpoint(path).digest()
    except UserError as error:
        assert "\n" not in str(error)


# --------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(save(STATE))
    with refused(name, "pickle"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_by_content(legacy, tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    with refused("pickle"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_length_that_begins_like_a_pickle(length, tmp_path):
    header = json.dumps({"w": entry()}).encode().ljust(length)
    assert open_checkpoint(write_raw(tmp_path / "x.safetensors", header, b"\0" * 8)).tensors.keys() == {"w"}


# --------------------------------------------------------------------------------------- folders


def test_nothing_there(tmp_path):
    with refused("no such file"):
        open_checkpoint(tmp_path / "none")


def test_a_folder_without_or_with_too_many_files(tmp_path):
    with refused("model.safetensors", "found none"):
        open_checkpoint(tmp_path)
    for name in "ab":
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with refused("found a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        7,
        None,
        ["a"],
        {},
    ],
)
def test_an_index_that_names_no_plain_file(name, tmp_path):
    save_file(STATE, tmp_path.parent / "x.safetensors")
    folder = shard(STATE, tmp_path / "shards", 1)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with refused("only plain file names"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["gone.safetensors", "nul\0"])
def test_a_missing_shard(name, tmp_path):
    folder = shard(STATE, tmp_path / "shards", 2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with refused(INDEX, "missing"):
        open_checkpoint(folder)


def test_an_index_that_names_a_file_too_long_for_any_disk(tmp_path):
    folder = shard(STATE, tmp_path / "shards", 2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "x" * 300}}))
    with refused("File name too long"):
        open_checkpoint(folder)


def test_a_shard_that_is_a_folder(tmp_path):
    folder = shard(STATE, tmp_path / "shards", 1)
    (folder / "part-0.safetensors").unlink()
    (folder / "part-0.safetensors").mkdir()
    with refused("part-0.safetensors"):
        open_checkpoint(folder)


def test_a_tensor_that_is_not_in_its_shard(tmp_path):
    folder = shard(STATE, tmp_path / "shards", 2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "ghost": "part-1.safetensors"}}))
    with refused("'ghost'", "part-1.safetensors"):
        open_checkpoint(folder)


def test_a_tensor_that_lies_in_two_shards(tmp_path):
    """Others that read all of each file would take the last one."""
    folder = shard(STATE, tmp_path / "shards", 2)
    save_file(STATE, folder / "part-1.safetensors")
    with refused(INDEX, "lies in 'part-0.safetensors' and in 'part-1.safetensors'", "keep one"):
        open_checkpoint(folder)


def test_an_index_that_names_a_tensor_twice(tmp_path):
    folder = shard(STATE, tmp_path / "shards", 2)
    text = (
        (folder / INDEX)
        .read_text()
        .replace('"logit_scale"', '"blocks.1.bias": "part-0.safetensors", "logit_scale"')
    )
    (folder / INDEX).write_text(text)
    with refused(INDEX, "twice"):
        open_checkpoint(folder)


# --------------------------------------------------------------------------------------- what is no file


@pytest.fixture(params=["pipe", "socket", "device"])
def no_file(request, tmp_path) -> Path:
    """What never ends, or waits for ever, where it is read."""
    if request.param == "device":
        return Path("/dev/zero")
    path = tmp_path / "it.safetensors"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))
    return path


def test_what_is_no_file_is_refused_at_once(no_file):
    with refused(str(no_file)):
        open_checkpoint(no_file)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "pytorch_model.bin", "model.gguf"])
def test_a_pipe_in_a_folder_is_refused_at_once(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with refused(name, "pipe"):
        open_checkpoint(tmp_path)


def test_a_link_that_leads_to_itself(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("x.safetensors")
    with refused("x.safetensors"):
        open_checkpoint(tmp_path / "x.safetensors")
    with refused("x.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_larger_than_any(tmp_path):
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 1 << 40)
    with refused(INDEX, "longer than"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        "[" * 100_000,
        b"\xff",
        '{"weight_map": 1}',
    ],
)
def test_an_index_that_is_none(index, tmp_path):
    (tmp_path / INDEX).write_bytes(index if isinstance(index, bytes) else index.encode())
    with refused(INDEX, "not a shard index"):
        open_checkpoint(tmp_path)


def test_a_link_out_of_the_folder(tmp_path):
    save_file(STATE, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with refused("link out of its folder"):
        open_checkpoint(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    with refused("link out of its folder"):
        open_checkpoint(folder)


def test_a_link_inside_the_folder(tmp_path):
    save_file(STATE, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to("blob")
    assert open_checkpoint(tmp_path).tensors.keys() == STATE.keys()


def test_safe_name_keeps_plain_names(tmp_path):
    assert safe_name(tmp_path, "a b.safetensors", Path("index")) == tmp_path / "a b.safetensors"
