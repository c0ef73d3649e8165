"""Folders of torch.distributed.checkpoint: read as they were saved, whatever their chunks, or refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from math import prod
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from checkpoints import ODD_TENSORS, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_shards import run_state, save_by_two, save_shards, trained

from mergeline.merging.checkpoints.checkpoint import Checkpoint, is_pickle, open_checkpoint, open_statistics
from mergeline.merging.checkpoints.dcp import METADATA
from mergeline.merging.checkpoints.pickled import Entries, Made, Unreadable, read_pickle
from mergeline.merging.checkpoints.shards import Chunk, contiguous, gather, tile
from mergeline.merging.errors import UserError

CASES = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_holds(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """The checkpoint holds the tensors of a state dict, and no more."""
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


# ------------------------------------------------------------------------------------------- what is read


def test_the_model_of_a_run_is_read_as_it_was_saved(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint = open_checkpoint(save_shards(run_state(model, optimizer), tmp_path / "step-3"))
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.notes == (
        "training shards: the model is what lies under 'model.'",
        "training shards: left out, for they are no weights: optim (30), rng, step",
    )


@pytest.mark.slow
def test_what_two_processes_sharded_is_read_as_one(tmp_path: Path) -> None:
    folder = save_by_two(tmp_path / "step-2")
    for read, file in (
        (open_checkpoint(folder), f"{folder}.safetensors"),
        (open_checkpoint(folder.with_name("step-2-pieces")), f"{folder}.safetensors"),
        (open_statistics("fisher", folder), f"{folder}-squares.safetensors"),
    ):
        assert_holds(read, load_file(file))
        assert read.digest() == open_checkpoint(file).digest()
    columns, rows = (open_checkpoint(folder).tensors[name].chunks for name in ("columns", "embed.weight"))
    assert [(c.offsets, c.sizes) for c in columns] == [((0, 0), (5, 4)), ((0, 4), (5, 3))]
    assert [(c.offsets, c.sizes) for c in rows] == [((0, 0), (4, 6)), ((4, 0), (3, 6))]


def test_every_dtype_is_read_and_the_digest_is_that_of_a_safetensors_copy(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in ODD_TENSORS.items() if tensor.dtype != torch.uint64}
    checkpoint = open_checkpoint(save_shards({"model": state}, tmp_path / "shards"))
    assert_holds(checkpoint, state)
    save_file(state, tmp_path / "copy.safetensors")
    assert checkpoint.digest() == open_checkpoint(tmp_path / "copy.safetensors").digest()


def test_tensors_that_do_not_lie_row_by_row_are_read_in_their_order(tmp_path: Path) -> None:
    state = {
        "conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 3).t(),
        "view": torch.randn(8, 8)[2:5, 1:4],
    }
    assert_holds(open_checkpoint(save_shards({"model": state}, tmp_path / "shards")), state)


@pytest.mark.parametrize(
    "nest",
    [
        lambda model, optim: {"model": model, "optimizer": optim},
        lambda model, optim: {"app": {"model": model, "optim": optim}},
        lambda model, optim: {"model": model, "optimizer_0": optim},
        lambda model, optim: {"state_dict": model, "epoch": 3, "rng": torch.zeros(2)},
        lambda model, optim: {**model, "optimizer": optim, "train_state": {"step": torch.tensor(3)}},
        lambda model, optim: model,
    ],
)
def test_the_model_is_found_among_what_was_saved(
    tmp_path: Path, nest: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
) -> None:
    model = {"model.layers.0.weight": torch.randn(3, 2), "lm_head.weight": torch.randn(4)}
    optim = {"state": {name: {"exp_avg_sq": tensor.square()} for name, tensor in model.items()}}
    state = nest(model, optim)
    folder = save_shards(state, tmp_path / "shards")
    assert_holds(open_checkpoint(folder), model)
    if "exp_avg_sq" in str(state):
        squares = {name: tensor.square() for name, tensor in model.items()}
        assert_holds(open_statistics("fisher", folder), squares)


@pytest.mark.parametrize("flat", [False, True])
def test_second_moments_have_the_names_of_their_parameters(tmp_path: Path, flat: bool) -> None:
    model, optimizer = trained()
    state = run_state(model, optimizer)
    squares = {name: own["exp_avg_sq"] for name, own in state["optim"]["state"].items()}
    if flat:  # as torchtitan has it
        state["optimizer"] = {
            f"state.{name}.{key}": value
            for name, own in state.pop("optim")["state"].items()
            for key, value in own.items()
        }
    folder = save_shards(state, tmp_path / "shards")
    assert_holds(open_statistics("fisher", folder), squares)
    assert_holds(open_statistics("instruction", folder), model.state_dict())


def test_what_accelerate_writes_is_found_in_its_folders(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = run_state(model, optimizer)
    squares = {name: own["exp_avg_sq"] for name, own in state["optim"]["state"].items()}
    save_shards({"model": state["model"]}, tmp_path / "pytorch_model_fsdp_0")
    save_shards({"optimizer": state["optim"]}, tmp_path / "optimizer_0")
    (tmp_path / "scheduler.pt").touch()
    assert_holds(open_checkpoint(tmp_path), model.state_dict())
    assert_holds(open_statistics("fisher", tmp_path), squares)
    assert not is_pickle(tmp_path)


def save_pieces(folder: Path, *pieces: dict[str, tuple[list[int], Tensor]]) -> Path:
    """Files as torch's HuggingFaceStorageWriter writes them, one a process."""
    folder.mkdir()
    for i, parts in enumerate(pieces, start=1):
        info = {"DCP_SHARDING_INFO": json.dumps({n: {"saved_offsets": at} for n, (at, _) in parts.items()})}
        file = folder / f"shard-{i:05}-model-00001-of-00001.safetensors"
        save_file({name: part.contiguous() for name, (_, part) in parts.items()}, file, info)
    return folder


def test_pieces_of_safetensors_are_read_as_whole_tensors(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"a": torch.randn(5, 3), "b": torch.randn(4), "step": torch.tensor(2)}
    first = {"a": ([0, 0], state["a"][:, :2]), "b": ([0], state["b"]), "step": ([], state["step"])}
    second = {"a": ([0, 2], state["a"][:, 2:]), "optim.state.b.exp_avg": ([0], torch.ones(4))}
    checkpoint = open_checkpoint(save_pieces(tmp_path / "pieces", first, second))
    assert_holds(checkpoint, state)
    assert [note.partition(": ")[2][:8] for note in checkpoint.notes] == ["2 files ", "left out"]
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "real"), save_distributed=True)
    assert_holds(open_checkpoint(save_shards(state, tmp_path / "real", storage_writer=writer)), state)


def test_pieces_that_leave_a_hole_or_do_not_say_where_they_lie_are_refused(tmp_path: Path) -> None:
    hole = [{"a": ([0], torch.ones(2))}, {"a": ([3], torch.ones(2))}]
    with refused("'a' leave a hole"):
        open_checkpoint(save_pieces(tmp_path / "hole", *hole))
    with refused("'a' leave a hole, overlap"):
        open_checkpoint(save_pieces(tmp_path / "overlap", hole[0], hole[0]))
    with refused("does not say where in 'a'"):
        open_checkpoint(save_pieces(tmp_path / "axes", {"a": ([0, 0], torch.ones(2))}))
    save_file({"a": torch.ones(2)}, tmp_path / "axes" / "shard-00001-model-00001-of-00001.safetensors")
    with refused("DCP_SHARDING_INFO"):
        open_checkpoint(tmp_path / "axes")


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_any_stretch_of_any_grid_of_chunks_is_read(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    whole = torch.arange(prod(shape)).reshape(shape)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes: list[tuple[tuple[int, int], ...]] = [()]
    for ends in cuts:
        boxes = [(*box, span) for box in boxes for span in zip(ends, ends[1:])]
    stores, chunks = {}, []
    for i, box in enumerate(boxes):
        part = whole[tuple(slice(*span) for span in box)].clone()
        order = data.draw(st.permutations(range(part.dim())))
        if order and data.draw(st.booleans()):  # axes in another order in memory
            part = part.permute(order).contiguous().permute([order.index(a) for a in range(part.dim())])
        file = Path(str(i))
        stores[file] = torch.cat([torch.tensor([-1]), part.as_strided((part.numel(),), (1,))])
        offsets, sizes = tuple(a for a, _ in box), tuple(b - a for a, b in box)
        chunks.append(Chunk(file, 0, 0, offsets, sizes, part.stride(), 1))
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    out = torch.full((stop - start,), -2)

    def read(chunk: Chunk, first: int, into: Tensor) -> None:
        into.copy_(stores[chunk.file][first : first + len(into)])

    assert tile(shape, chunks)
    gather(out, shape, chunks, start, read)
    assert torch.equal(out, whole.flatten()[start:stop])
    if len(chunks) > 1:
        assert not tile(shape, chunks[1:]) and not tile(shape, [*chunks, chunks[0]])


def test_chunks_in_no_grid_fill_a_tensor_or_do_not() -> None:
    def boxes(*spans: tuple[int, int, int, int]) -> list[Chunk]:
        return [contiguous(Path(), 0, 0, span[:2], span[2:]) for span in spans]

    pinwheel = boxes((0, 0, 1, 2), (0, 2, 2, 1), (2, 1, 1, 2), (1, 0, 2, 1), (1, 1, 1, 1))
    assert tile((3, 3), pinwheel)
    assert not tile((3, 3), boxes((0, 0, 1, 2), (0, 1, 2, 2), (2, 1, 1, 2), (1, 0, 1, 1)))


def test_memory_is_that_of_the_stretch_that_is_asked_for(tmp_path: Path) -> None:
    rows = torch.arange(300_000, dtype=torch.float32).reshape(300, 1000)
    checkpoint = open_checkpoint(save_shards({"model": {"w": rows}}, tmp_path / "shards"))
    asked: list[int] = []

    class Watched:
        def read_into(self, view: memoryview, info: Any, start: int) -> None:
            asked.append(len(view))

    view = memoryview(bytearray(8000))
    checkpoint.tensors["w"].fill(lambda file: Watched(), view, 4 * 500)  # type: ignore[arg-type, return-value]
    assert sum(asked) == 8000


# ---------------------------------------------------------------------------------------- what is refused


def saved(folder: Path) -> Path:
    state = {"a": torch.ones(3, 2), "b": torch.ones(4), "c": torch.zeros(3, 2)}
    return save_shards({"model": state, "step": 1}, folder)


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("place", ["whole", "state_dict_metadata", "planner_data"])
def test_metadata_that_name_a_command_are_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, place: str
) -> None:
    folder, mark = saved(tmp_path / "shards"), tmp_path / "mark"
    metadata = pickle.loads((folder / METADATA).read_bytes())
    if place == "planner_data":
        metadata.planner_data = Runs(mark)
    elif place == "state_dict_metadata":
        metadata.state_dict_metadata["model.a"] = Runs(mark)
    else:
        metadata = Runs(mark)
    (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol))
    if place == "planner_data":  # names alone are taken from there; what is none of those is not looked at
        open_checkpoint(folder)
    else:
        with refused(str(folder / METADATA), "system"):
            open_checkpoint(folder)
    assert not mark.exists()


def test_a_chunk_that_names_a_command_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = saved(tmp_path / "shards")
    metadata = pickle.loads((folder / METADATA).read_bytes())
    [file] = folder.glob("*.distcp")
    [info] = [info for index, info in metadata.storage_data.items() if index.fqn == "model.a"]
    info.offset = file.stat().st_size
    with open(file, "ab") as opened:
        torch.save(Runs(mark), opened)
        info.length = opened.tell() - info.offset
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with refused(str(folder), "model.a", "no plain tensor"):
        open_checkpoint(folder)
    assert not mark.exists()


def test_one_number_that_stands_for_many_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "shards")
    metadata = pickle.loads((folder / METADATA).read_bytes())
    [file] = folder.glob("*.distcp")
    info, size = infos(metadata), torch.Size([1 << 20, 1 << 20])
    info.offset = file.stat().st_size
    with open(file, "ab") as opened:
        torch.save(torch.ones(1, 1).expand(size), opened)
        info.length = opened.tell() - info.offset
    metadata.state_dict_metadata["model.a"].size = size
    metadata.state_dict_metadata["model.a"].chunks[0].sizes = size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with refused("model.a", "longer than its storage"):
        open_checkpoint(folder)


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def test_properties_as_torch_before_2_3_wrote_them_are_read(tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def older(metadata: Any) -> None:
        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "properties"):
                entry.properties = TensorProperties(dtype=entry.properties.dtype)

    folder = changed(saved(tmp_path / "shards"), older)
    assert b"sharded_tensor.metadata" in (folder / METADATA).read_bytes()
    assert open_checkpoint(folder).digest() == open_checkpoint(saved(tmp_path / "newer")).digest()


def infos(metadata: Any, name: str = "model.a") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: infos(m).__setattr__("transform_descriptors", ["zstd"]), "compressed or encrypted"),
        (lambda m: infos(m).__setattr__("relative_path", "../x.distcp"), "plain file names"),
        (lambda m: infos(m).__setattr__("relative_path", "away.distcp"), "is missing"),
        (lambda m: infos(m).__setattr__("offset", 1 << 40), "cut off"),
        (lambda m: infos(m).__setattr__("offset", -1), "a number is missing"),
        (lambda m: infos(m).__setattr__("length", 5), "no file of torch.save"),
        (lambda m: infos(m).__setattr__("offset", infos(m, "model.b").offset), "its chunk is"),
        (lambda m: infos(m).__dict__.update(infos(m, "model.c").__dict__), "lies where another does"),
        (lambda m: m.storage_data.clear(), "nothing says where"),
        (
            lambda m: m.state_dict_metadata["model.a"].__dict__.update(
                size=torch.Size([0, 2**40]), chunks=[]
            ),
            "a dimension that no model has",
        ),
        (lambda m: m.state_dict_metadata["model.a"].chunks.clear(), "leave a hole"),
        (lambda m: setattr(m.state_dict_metadata["model.a"], "size", torch.Size([9, 2])), "leave a hole"),
        (
            lambda m: setattr(m.state_dict_metadata["model.a"].properties, "dtype", torch.complex64),
            "complex64",
        ),
        (lambda m: setattr(m.state_dict_metadata["model.a"].properties, "dtype", torch.float64), "float32"),
        (lambda m: m.planner_data.update({"model.a": ("student", "a")}), "left out"),
        (lambda m: m.state_dict_metadata.clear(), "found none"),
    ],
)
def test_metadata_that_say_what_is_not_so_are_refused(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    folder = changed(saved(tmp_path / "shards"), change)
    if words == "left out":
        assert any("student" in note for note in open_checkpoint(folder).notes)
        return
    with refused(str(folder), words):
        open_checkpoint(folder)


def test_a_part_of_shards_is_refused_and_is_no_pickle_to_be_converted(tmp_path: Path) -> None:
    for file in saved(tmp_path / "shards").iterdir():
        assert not is_pickle(file)
        with refused(str(file), "name its folder"):
            open_checkpoint(file)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "shards")
    (folder / METADATA).rename(tmp_path / "elsewhere")
    (folder / METADATA).symlink_to(tmp_path / "elsewhere")
    with refused("is a link out of its folder"):
        open_checkpoint(folder)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "shards")
    [file] = folder.glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)
    with refused(str(folder), "cut off"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "files, words",
    [
        (["common.pt", ".metadata"], "Megatron Core"),
        (["iter_0000100/mp_rank_00/model_optim_rng.pt"], "AutoBridge.export_ckpt"),
        (["global_step5/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "zero_to_fp32.py . OUT"),
        (["model_world_size_2_rank_0.pt"], "verl.model_merger"),
    ],
)
def test_shards_of_other_frameworks_are_refused_with_their_converter(
    tmp_path: Path, files: list[str], words: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with refused(str(tmp_path), words):
        open_checkpoint(tmp_path)


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    state = {"student": {"model": {"a": torch.ones(2)}}, "teacher": {"model": {"a": torch.ones(2)}}}
    with refused("needs one model", "student.model, teacher.model"):
        open_checkpoint(save_shards(state, tmp_path / "shards"))


def test_second_moments_that_are_missing_or_nameless_are_refused(tmp_path: Path) -> None:
    with refused("no second moments"):
        open_statistics("fisher", saved(tmp_path / "none"))
    model, optimizer = trained()
    numbered = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    with refused("numbers in place of names", "get_optimizer_state_dict"):
        open_statistics("fisher", save_shards(numbered, tmp_path / "numbered"))


# ------------------------------------------------------------------------------------------- fuzzed pickles


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("shards") / "known")


@pytest.mark.slow
@given(data=st.data())
@CASES
def test_changed_bytes_of_metadata_or_chunks_are_read_or_refused(
    tmp_path: Path, known: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(known, folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.binary(max_size=6) | st.sampled_from([b"R", b"b", b"\x81", b"c", b"\xff" * 4]))
        raw[at : at + data.draw(st.integers(0, 6))] = new
        raw = raw or bytearray(b"\x80")
    file.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except UserError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=200).map(lambda tail: b"\x80\x04" + tail) | st.binary(max_size=60))
@CASES
def test_any_bytes_are_a_pickle_or_unreadable(data: bytes) -> None:
    try:
        read_pickle(data)
    except (Unreadable, UnicodeDecodeError):
        pass


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**31), 2**62)
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary(),
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from([3, 4, 5]),
)
@settings(deadline=None)
def test_plain_values_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    def plain(found: Any) -> Any:
        if isinstance(found, Entries):
            return {key: plain(entry) for key, entry in found}
        return type(found)(map(plain, found)) if isinstance(found, list | tuple) else found

    assert plain(read_pickle(pickle.dumps(value, protocol))) == value


def test_a_pickle_that_wants_much_memory_or_calls_is_data() -> None:
    with pytest.raises(Unreadable):
        read_pickle(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.")  # BINBYTES8
    assert read_pickle(b"\x80\x04K\x01r\xff\xff\xff\xff.") == 1  # remembered as number 4,294,967,295
    made = read_pickle(b"cposix\nsystem\n(X\x04\x00\x00\x00exittR.")
    assert isinstance(made, Made) and made.name.text == "posix.system" and made.args == ("exit",)
