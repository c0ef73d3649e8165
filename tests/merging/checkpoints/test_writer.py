"""Files that we write, read back by the safetensors library."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from checkpoints import ODD_TENSORS, State, random_state, refused, same_tensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from mergeline.merging.checkpoints.checkpoint import DTYPES, open_checkpoint
from mergeline.merging.checkpoints.companions import INDEX
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec
from mergeline.merging.files import begin_writing

NAMES = {f"torch.{torch_name}": name for name, (torch_name, _) in DTYPES.items()}


def write(state: State, folder: Path, shard_size: int | None = None) -> list[Path]:
    specs = [TensorSpec(n, NAMES[str(t.dtype)], tuple(t.shape), t.nbytes) for n, t in state.items()]
    writer = CheckpointWriter(folder, specs, {"format": "pt"}, shard_size)
    for name, tensor in reversed(state.items()):
        writer.write(name, tensor)
    writer.finish()
    return [folder / name for name in writer.files]


@pytest.mark.parametrize("state", [random_state(0), ODD_TENSORS, {}], ids=["plain", "odd", "nothing"])
def test_the_library_reads_what_we_write(state, tmp_path):
    [file] = write(state, tmp_path)
    assert same_tensors(load_file(file), state)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert same_tensors({n: open_checkpoint(file).read(n) for n in state}, state)


def test_the_layout_is_that_of_the_library(tmp_path):
    state = {**random_state(0), "half": torch.ones(3, dtype=torch.float16)}
    [file] = write(state, tmp_path)
    theirs = save(state, metadata={"format": "pt"})
    ours = file.read_bytes()
    assert (
        ours[int.from_bytes(ours[:8], "little") + 8 :] == theirs[int.from_bytes(theirs[:8], "little") + 8 :]
    )
    assert int.from_bytes(ours[:8], "little") % 8 == 0


def test_a_tensor_goes_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    begun: list[tuple[int, int]] = []

    def recording(handle: int, start: int, stop: int) -> bool:
        assert stop <= tensor._next
        begun.append((start, stop))
        return begin_writing(handle, start, stop)

    monkeypatch.setattr("mergeline.merging.checkpoints.writer.begin_writing", recording)
    values = torch.arange(1 << 20, dtype=torch.float32)
    writer = CheckpointWriter(
        tmp_path, [TensorSpec("a", "F32", tuple(values.shape), values.nbytes)], {}, None
    )
    tensor = writer.open("a")
    for part in values.split(99_999):
        tensor.append(part)
    tensor.close()
    writer.finish()
    [file] = tmp_path.iterdir()
    size = file.stat().st_size
    assert begun[0][0] == size - values.nbytes and size - begun[-1][1] < 1 << 20
    assert [stop for _, stop in begun[:-1]] == [start for start, _ in begun[1:]]
    assert all(stop % mmap.PAGESIZE == 0 for _, stop in begun)
    assert same_tensors(load_file(file), {"a": values})


def test_writing_is_begun_where_the_system_can(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * (1 << 16))
        file.flush()
        assert begin_writing(file.fileno(), 0, 1 << 16)
        assert begin_writing(file.fileno(), 1 << 40, 1 << 41)
        assert not begin_writing(file.fileno(), 1 << 33, 0)  # sizes are of 64 bits, with their sign


# Tensor names are JSON strings without lone surrogates; `__metadata__` is the format's own.
@example(names={"/", "/a"})
@given(
    names=st.sets(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__"),
        max_size=4,
    )
)
def test_names_may_hold_any_characters(names, tmp_path_factory):
    state = {name: torch.tensor([float(i)]) for i, name in enumerate(sorted(names))}
    [file] = write(state, tmp_path_factory.mktemp("names"))
    assert same_tensors(load_file(file), state)
    assert open_checkpoint(file).tensors.keys() == state.keys()


@pytest.mark.parametrize(("shard_size", "count"), [(1, 4), (100, 2), (10_000, 1)])
def test_shards_of_a_largest_size(shard_size, count, tmp_path):
    state = random_state(0)  # 96, 60, 28 and 4 bytes
    files = write(state, tmp_path, shard_size)
    assert len(files) == count
    merged = {}
    for file in files:
        shard = load_file(file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_size
        merged |= shard
    assert same_tensors(merged, state)
    if count > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 188 and index["weight_map"].keys() == state.keys()
        assert {tmp_path / name for name in index["weight_map"].values()} == set(files)
    assert same_tensors({n: open_checkpoint(tmp_path).read(n) for n in state}, state)


SPECS = [TensorSpec(name, "F32", tuple(t.shape), t.nbytes) for name, t in random_state(0).items()]


def test_pieces_make_the_same_file(tmp_path):
    state = random_state(0)
    [whole] = write(state, tmp_path / "whole")
    writer = CheckpointWriter(tmp_path / "pieces", SPECS, {"format": "pt"}, None)
    for name, tensor in state.items():
        piecewise = writer.open(name)
        for piece in tensor.reshape(-1).split(5):
            piecewise.append(piece)
        hash = piecewise.close()
        assert hash == writer.hashes[name] == writer.stored_hash(name)
    writer.finish()
    [pieces] = (tmp_path / "pieces").glob("*")
    assert pieces.read_bytes() == whole.read_bytes()
    assert writer.hashes == open_checkpoint(pieces).tensor_hashes


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"metadata": {"format": "np"}}, False),
        ({"tensors": SPECS[1:]}, False),
        ({"tensors": [TensorSpec("more", "F32", (1,), 4), *SPECS]}, False),
    ],
)
def test_files_of_the_same_header_are_kept(change, kept, tmp_path):
    given = {"tensors": SPECS, "metadata": {"format": "pt"}, "shard_size": None}
    write(random_state(0), tmp_path)
    writer = CheckpointWriter(tmp_path, **{**given, **change}, resume=True)
    name = "blocks.1.bias"
    assert (writer.stored_hash(name) == tensor_hash(random_state(0)[name])) == kept
    writer.write(name, torch.zeros(7))
    assert writer.stored_hash(name) == tensor_hash(torch.zeros(7))
    writer.close()
    assert torch.equal(open_checkpoint(tmp_path).read(name), torch.zeros(7))
    with pytest.raises(FileExistsError):
        CheckpointWriter(tmp_path, **given)


def tensor_hash(tensor: torch.Tensor) -> str:
    return blake3(tensor.numpy().tobytes()).hexdigest()


def test_a_tensor_of_too_few_or_many_elements_is_our_fault(tmp_path):
    writer = CheckpointWriter(tmp_path, SPECS, {}, None)
    for size in (6, 8):
        piecewise = writer.open("blocks.1.bias")
        piecewise.append(torch.ones(size))
        with pytest.raises(AssertionError):
            piecewise.close()
    with pytest.raises(AssertionError):
        writer.open("blocks.1.bias").append(torch.ones(7, dtype=torch.float64))
    writer.close()


def test_a_tensor_that_was_not_announced_is_our_fault(tmp_path):
    writer = CheckpointWriter(tmp_path, [TensorSpec("w", "F32", (2,), 8)], {}, None)
    with pytest.raises(AssertionError):
        writer.write("w", torch.ones(3))
    with pytest.raises(AssertionError):
        writer.finish()  # w was never written
    writer.close()


def test_who_joins_a_merge_does_not_replace_its_files(tmp_path):
    specs = [TensorSpec("a", "F32", (2,), 8)]
    CheckpointWriter(tmp_path, specs, {}, None).close()
    CheckpointWriter(tmp_path, specs, {}, None, join=True).close()
    before = (tmp_path / "model.safetensors").read_bytes()
    with refused("another merge took its place"):
        CheckpointWriter(tmp_path, [TensorSpec("b", "F32", (3,), 12)], {}, None, resume=True, join=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before
