"""Compressed stores: N experts in the space of a few, any of which is given back on its own.

A store is a safetensors file, or a folder with one or more, of what a method (`merging.methods.stored.Store`) keeps of
every tensor: `once/PART/TENSOR` for all experts, `INDEX/PART/TENSOR` of each, masks as packed bits; what several
matrices have in common is kept with the first of them. Its metadata says the rest: the method and its parameters, the
experts' names, the base's digest, the dtype and shape of every tensor.
What comes out is, bit for bit, what the method merges with the expert's number as `task`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from mergeline.merging.algebra.slots import MatrixView, View, Views, block_elements, by_stretch
from mergeline.merging.architecture import Matrix, describe
from mergeline.merging.canonical import canonical_json
from mergeline.merging.checkpoints.carried import carry
from mergeline.merging.checkpoints.checkpoint import (
    DTYPES,
    FLOATS,
    Checkpoint,
    Files,
    TensorInfo,
    open_checkpoint,
)
from mergeline.merging.checkpoints.companions import WEIGHTS
from mergeline.merging.checkpoints.writer import CheckpointWriter, TensorSpec, TensorWriter
from mergeline.merging.engine.blocks import merged_blocks, rounded
from mergeline.merging.engine.inputs import files_of, refuse_changed, stamps
from mergeline.merging.engine.machine import one_thread
from mergeline.merging.engine.manifest import (
    Manifest,
    described_output,
    is_single,
    origin_of,
    publish_files,
    read_manifest,
    versions,
)
from mergeline.merging.engine.output import opened, publish_all
from mergeline.merging.engine.places import refuse_place
from mergeline.merging.engine.plan import Entry, Plan
from mergeline.merging.engine.planning import make_plan
from mergeline.merging.engine.sources import FileInputs
from mergeline.merging.engine.work import Finished, Progress, found_for, hashes_read, run
from mergeline.merging.errors import UserError, did_you_mean, plainly
from mergeline.merging.files import staged
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Bound, bind
from mergeline.merging.methods.contract import catalogue, get_method
from mergeline.merging.methods.parameters import PositiveCount
from mergeline.merging.methods.stored import Part
from mergeline.merging.reading import parsed_json
from mergeline.merging.recipes.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_FORMAT = 1
_METADATA = "mergeline.store"
_SQUARES = "squares"  # what is remembered of a tensor
_BITS = 8  # in a byte of a mask
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _Shared(BaseModel):
    """With which matrix the parts of a group are kept, and how many matrices the group is of."""

    model_config = ConfigDict(extra="forbid")

    owner: str
    together: PositiveCount


class _Kept(BaseModel):
    """A tensor that a store gives back: the base's, a `copy` that all experts share, or restored from its `parts`."""

    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: list[int]
    how: Literal["base", "copy", "parts"]
    read: Literal["F32", "F64"] = "F32"  # what it is computed in
    params: dict[str, Any] = {}  # that differ from the store's
    matrices: list[dict[str, Any]] = []  # that it consists of, if it is not one itself
    shared: list[_Shared] = []  # of each of its matrices, where the method's have parts in common


class _Header(BaseModel):
    """What the metadata of a store says."""

    model_config = ConfigDict(extra="forbid")

    format: int
    method: str
    params: dict[str, Any]
    experts: list[str]
    base: str | None
    tensors: dict[str, _Kept]


def _once(part: str, name: str) -> str:
    return f"once/{part}/{name}"


def _own(t: int, part: str, name: str) -> str:
    return f"{t}/{part}/{name}"


def _fact(t: int, part: str) -> str:
    return f"{t}/{part}"


def _spec(name: str, part: Part, dtypes: Mapping[str, str]) -> TensorSpec:
    """How a part is written; `dtypes` says it for the kinds that depend on the tensor."""
    if part.kind == "bits":
        length = -(-prod(part.shape) // _BITS)
        return TensorSpec(name, "U8", (length,), length)
    dtype = {"fact": "F64", **dtypes}[part.kind]
    return TensorSpec(name, dtype, part.shape, prod(part.shape) * DTYPES[dtype][1])


def _parts_of(bound: Bound, piece: View, shared: _Shared | None) -> Iterator[tuple[str, Part, int | None]]:
    """Every stored tensor that belongs to a tensor, or matrix: its name, the part, and the expert (None: all)."""
    if not piece.elements:
        return
    shape = piece.shape if isinstance(piece, MatrixView) else piece.stored_shape
    together = {"together": shared.together} if shared else {}
    once, own = bound.stored_as(piece).parts(shape, len(piece.experts), **bound.own, **together)

    def of(what: Part) -> str:
        return shared.owner if shared and what.of_group else piece.name

    for part, what in once.items():
        yield _once(part, of(what)), what, None
    for t in range(len(piece.experts)):
        for part, what in own.items():
            yield (_fact(t, part) if what.kind == "fact" else _own(t, part, of(what))), what, t


# ---------------------------------------------------------------------------------------------- compressing


def compress(
    recipe: Recipe | Mapping[str, Any] | Plan,
    out: str | os.PathLike,
    *,
    device: str = "cpu",
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    factors: str | os.PathLike | None = None,
    force: bool = False,
) -> Manifest:
    """Keep all experts of a recipe in one store, from one reading; returns its manifest.

    The recipe's method says how; its `task` is not used. Everything else is as with `merging.merge`: the bytes do not
    depend on workers, memory or factors, memory is bounded, and a killed run goes on where it was. The manifest's
    `store` has the bytes that are kept once and of each expert, those of a checkpoint, and how far each expert is from
    what is given back: relative Frobenius errors, of what it adds to the base, or without one of its weights.

    Raises:
        UserError: as `merging.merge`; a method that is no store, vocabularies that differ.
    """
    plan, out = recipe if isinstance(recipe, Plan) else make_plan(recipe), Path(out)
    plan.check()
    if problem := _problem(plan):
        raise UserError(problem)
    layout = _Layout(plan)
    with opened(
        [plan], [out], device=device, memory=memory, workers=workers, factors=factors, need=plan.peak_bytes,
        lapack=plan.is_spectral, layout=lambda _: layout, kind="store", force=force,
    ) as (source, [output], pool):  # fmt: skip
        writer, facts = output.writer, output.journal.facts
        for name in layout.facts:
            value = facts[int(name.partition("/")[0])] if facts else 1.0
            writer.write(name, torch.tensor(value, dtype=torch.float64))

        def write(entry: Entry) -> Finished:
            hashes, squares = _encode(layout, entry, source, writer, facts)
            remembered = {_SQUARES: squares} if squares else {}
            return Finished(entry.name, [hashes], hashes_read(source, entry), remembered)

        remembered = run(source, [output], write, pool, progress)
        writer.finish()
        told = layout.sizes() | {"errors": layout.errors(remembered)}
        return publish_all([output], source, device, {"store": told})[0]


def store_sizes(plan: Plan) -> dict[str, Any] | None:
    """Bytes of the store that a plan makes, once and of each expert, and of a checkpoint; None if it makes none."""
    return None if plan.problems or _problem(plan) else _Layout(plan).sizes()


def _problem(plan: Plan) -> str | None:
    """Why a plan, which has no problems of its own, makes no store."""
    assert plan.method is not None
    if plan.method.store is None:
        return f"{plan.method.id} makes one merge of all; choose one of {', '.join(stores())}"
    if plan.alignment:
        return "the vocabularies differ, and a store keeps the base's alone; align them first"
    if plan.stack or plan.onto:
        what = "stack" if plan.stack else "onto"
        return f"a store keeps experts as they differ from their base; leave out {what}, or merge first"
    if plan.components:
        return (
            f"the checkpoints have several components ({', '.join(plan.components)}), and a store is of one: compress "
            "the folder of each"
        )
    return None


def stores() -> list[str]:
    """The methods that can be kept as a store."""
    return [id for id, entry in catalogue().items() if entry.store]


class _Layout:
    """What a store of a plan will hold, from headers; only its metadata has the base read, for the digest."""

    file = WEIGHTS

    def __init__(self, plan: Plan):
        assert plan.method is not None
        self.plan = plan
        self.names = list(plan.experts)
        self.parts: dict[str, dict[str, TensorSpec]] = {}  # of each tensor
        self.facts: dict[str, TensorSpec] = {}
        self._groups = self._found_groups()
        self._settings = {
            piece.name: self._setting(entry)
            for entry in (plan.entries if self._groups is not None else ())
            if entry.bound and self.is_encoded(entry)
            for piece in entry.bound.pieces(entry.header)
        }
        self.tensors = {entry.name: self._add(entry) for entry in plan.entries}
        self.specs = [spec for parts in self.parts.values() for spec in parts.values()]
        self.specs += self.facts.values()
        self.relative = "base" in plan.method.needs_of(plan.params)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the files say of the store."""
        plan = self.plan
        assert plan.method is not None
        needs_base = self.relative or any(kept.how == "base" for kept in self.tensors.values())
        header = _Header(
            format=_FORMAT,
            method=plan.method.id,
            params={k: v for k, v in plan.params.items() if k != "task"},
            experts=self.names,
            base=plan.base.digest() if plan.base and needs_base else None,
            tensors=self.tensors,
        )
        return {_METADATA: canonical_json(header.model_dump(exclude_defaults=True))}

    def _found_groups(self) -> Any:
        """What the method's look says of matrices with parts in common, which it does by headers; None of others."""
        method = self.plan.method
        assert method is not None and method.store is not None
        if method.store.group is None:
            return None
        return self.plan.bound.look_at_model(Views([entry.header for entry in self.plan.merged]))

    @staticmethod
    def _setting(entry: Entry) -> Any:
        """Equal for tensors of which parts in common are the same."""
        assert entry.bound is not None
        return canonical_json(entry.bound.flat), "F64" in entry.dtypes

    def _shared(self, entry: Entry, piece: View) -> _Shared | None:
        """With whom a matrix has parts in common: the first of those that are kept in the same way owns them."""
        assert entry.bound is not None
        store = entry.bound.stored_as(piece)
        if store.group is None or not piece.elements:
            return None
        names, setting = store.group(piece.name, self._groups), self._setting(entry)
        owner = next(name for name in names if self._settings.get(name) == setting)
        return _Shared(owner=owner, together=len(names))

    def _add(self, entry: Entry) -> _Kept:
        spec, parts = entry.spec, self.parts.setdefault(entry.name, {})
        kept = partial(_Kept, dtype=spec.dtype, shape=list(spec.shape))
        if entry.action == "copy" and entry.base:
            return kept(how="base")
        if not self.is_encoded(entry):
            name = _once("whole", spec.name)
            parts[name] = TensorSpec(name, spec.dtype, spec.shape, spec.nbytes)
            return kept(how="copy")
        assert entry.bound is not None
        read: Literal["F32", "F64"] = "F64" if "F64" in entry.dtypes else "F32"
        dtypes = {"number": _STORED.get(entry.bound.params["stored"], read)}
        pieces = entry.bound.pieces(entry.header)
        shared = [self._shared(entry, piece) for piece in pieces]
        for piece, of in zip(pieces, shared):
            for name, part, t in _parts_of(entry.bound, piece, of):
                if part.of_group and of and of.owner != piece.name:
                    continue
                if part.kind == "exact" and t is not None:
                    dtypes["exact"] = entry.sources[self.names[t]].dtype
                (self.facts if part.kind == "fact" else parts)[name] = _spec(name, part, dtypes)
        differ = {k: v for k, v in entry.bound.flat.items() if k != "task" and v != self.plan.params[k]}
        matrices = [asdict(piece.matrix) for piece in pieces if isinstance(piece, MatrixView)]
        return kept(how="parts", read=read, params=differ, matrices=matrices, shared=[*filter(None, shared)])

    def is_encoded(self, entry: Entry) -> bool:
        """Whether the store keeps parts of it; what all experts share is kept as it is."""
        return entry.bound is not None and entry.bound.method is self.plan.method

    def sizes(self) -> dict[str, Any]:
        """Bytes that are kept once, of each expert, and of a checkpoint."""
        once, own = 0, dict.fromkeys(self.names, 0)
        for spec in self.specs:
            owner = spec.name.partition("/")[0]
            if owner == "once":
                once += spec.nbytes
            else:
                own[self.names[int(owner)]] += spec.nbytes
        return {"checkpoint": self.plan.bytes_written, "once": once, "experts": own}

    def errors(self, remembered: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Relative Frobenius errors of what is given back of each expert, over all tensors, and of each.

        `of`: what they are relative to. An expert, or a tensor, that has none of it has no error.
        """
        squares = {name: found[_SQUARES] for name, found in sorted(remembered.items()) if _SQUARES in found}
        found: dict[str, Any] = {}
        for t, expert in enumerate(self.names):
            own = {name: of[t] for name, of in squares.items() if of[t][1]}
            if own:
                apart, size = (sum(of[i] for of in own.values()) for i in (0, 1))
                tensors = {name: (of[0] / of[1]) ** 0.5 for name, of in own.items()}
                worst = max(tensors, key=tensors.__getitem__)
                found[expert] = {"all": (apart / size) ** 0.5, "worst_tensor": worst, "tensors": tensors}
        return {
            "of": "what an expert adds to the base" if self.relative else "an expert's weights",
            "experts": found,
        }


def _encode(
    layout: _Layout, entry: Entry, source: FileInputs, writer: CheckpointWriter, facts: Any
) -> tuple[dict[str, str], list[list[float]]]:
    """Write what is kept of a tensor; the hashes of what was written, and of each expert two sums of squares.

    They are of what the store changes of it, and of what that is relative to; none of what all experts share.
    """
    sinks = {name: _Sink(writer.open(name), spec) for name, spec in layout.parts[entry.name].items()}
    squares: list[list[float]] = []
    if entry.bound is None:
        for block in source.copied(list(entry.origins), entry.name, entry.action == "largest"):
            for sink in sinks.values():
                sink.append(block)
    elif not layout.is_encoded(entry):
        [sink] = sinks.values()
        for _, block in merged_blocks(source.view(entry), [entry.bound], [None]):
            sink.append(block)
    else:
        bound, facts = entry.bound, found_for(entry, facts)
        squares = [[0.0, 0.0] for _ in layout.names]
        for piece in bound.pieces(source.view(entry)):
            look = bound.look_at_tensor(piece, facts)
            for x in piece.blocks(bound.unit(piece)):
                once, own = bound.encode(x, facts, look, range(len(layout.names)))
                base_X = x.base
                for part, value in once.items():
                    sinks[_once(part, piece.name)].append(value)
                for t, values in enumerate(own):
                    for part, value in values.items():
                        if _own(t, part, piece.name) in sinks:  # facts are not kept by tensor
                            sinks[_own(t, part, piece.name)].append(value)
                    given_X, expert_X = (
                        bound.decode(piece, base_X, once, values, x.shape, x.dtype),
                        x.experts[t],
                    )
                    from_X = expert_X - base_X if layout.relative and base_X is not None else expert_X
                    for i, apart_X in enumerate((given_X - expert_X, from_X)):
                        squares[t][i] += float(torch.linalg.vector_norm(apart_X, dtype=torch.float64)) ** 2
    return {name: sink.close() for name, sink in sinks.items()}, squares


class _Sink:
    """Writes one part, block by block: numbers in the announced dtype, masks as bits."""

    def __init__(self, writer: TensorWriter, spec: TensorSpec):
        self._writer, self._spec = writer, spec
        self._bits: NDArray[np.bool_] | None = None  # of a mask, that do not fill a byte yet

    def append(self, value: Tensor) -> None:
        if value.dtype == torch.bool and self._spec.dtype == "U8":
            self._append_bits(value)
        else:
            self._writer.append(_finite(value, self._spec))

    def _append_bits(self, mask: Tensor) -> None:
        import numpy as np

        bits = mask.reshape(-1).cpu().numpy()
        if self._bits is not None:
            bits = np.concatenate([self._bits, bits])
        full = len(bits) // _BITS * _BITS
        self._writer.append(torch.from_numpy(np.packbits(bits[:full])))
        self._bits = bits[full:]

    def close(self) -> str:
        import numpy as np

        if self._bits is not None and len(self._bits):
            self._writer.append(torch.from_numpy(np.packbits(self._bits)))
        return self._writer.close()


def _finite(value: Tensor, spec: TensorSpec) -> Tensor:
    """Floats in the dtype that is written (raises UserError if one is not finite); others as they are."""
    return rounded(value, spec) if value.is_floating_point() else value


# ---------------------------------------------------------------------------------------------- extracting


def extract_expert(
    store: str | os.PathLike,
    name: str,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Manifest:
    """Write one expert of a store as a checkpoint; returns its manifest, which names the digests of store and base.

    A store that is relative to a base needs it: by default the one that its manifest names, or else `base`.

    Raises:
        UserError: no store or a damaged one, an unknown expert, another base than the store was made with, a store or
            base that changes while it is read, an `out` that holds something else (`force` as with `merging.merge`).
    """
    kept, out = CompressedStore(store), Path(out)
    task = kept.task(name)
    base_path = kept.find_base(base)
    kept.open_base(base_path)
    read = [kept.checkpoint, *([kept.base] if kept.base else [])]
    before = stamps(file for checkpoint in read for file in files_of(checkpoint))
    refuse_place(out, [*(checkpoint.path for checkpoint in read), *before], "expert", force)
    kept.check_base()
    specs = kept.specs
    lineage = canonical_json({"method": kept.header.method, "expert": name})
    metadata = {"format": "pt", "mergeline.expert": lineage}
    with one_thread(), staged(out) as folder, Files() as files:
        writer = CheckpointWriter(folder, specs, metadata, shard_size)
        if is_single(out) and len(writer.files) > 1:
            writer.close()
            raise UserError(f"{out}: --shard-size makes several files; name a folder instead")
        for done, spec in enumerate(specs, 1):
            sink = writer.open(spec.name)
            for block in kept.blocks(files, spec, task):
                sink.append(_finite(block, spec))
            sink.close()
            if progress:
                progress(done, len(specs))
        writer.finish()
        extracted = {
            "store": origin_of(out, kept.path, kept.checkpoint.digest()),
            "expert": name,
            "base": origin_of(out, kept.base.path, kept.base.digest()) if kept.base else None,
            "shard_size": shard_size,
        }
        output = described_output(writer)
        manifest = {"format": 1, "extracted": extracted, "output": output, "versions": versions()}
        if kept.path.is_dir() and not is_single(out):
            carry(kept.path, specs, writer.folder)
        refuse_changed(before)
        publish_files(manifest, writer, out)
    return manifest


def expert_state(
    store: str | os.PathLike, name: str, *, base: str | os.PathLike | None = None
) -> dict[str, Tensor]:
    """The tensors of one expert of a store, in memory: those that `extract_expert` writes.

    Raises:
        UserError: as `extract_expert`.
    """
    kept = CompressedStore(store)
    task = kept.task(name)
    kept.open_base(kept.find_base(base))
    kept.check_base()
    state = {}
    with one_thread(), Files() as files:
        for spec in kept.specs:
            blocks = [_finite(block, spec).reshape(-1) for block in kept.blocks(files, spec, task)]
            state[spec.name] = torch.cat(blocks).reshape(spec.shape)
    return state


def is_store(path: str | os.PathLike) -> bool:
    """Whether a checkpoint is a compressed store."""
    return _METADATA in open_checkpoint(path).metadata


@dataclass(init=False)
class CompressedStore:
    """A store, whose header was checked; raises UserError if it is none, damaged, or of a newer format."""

    path: Path
    checkpoint: Checkpoint
    header: _Header

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint = open_checkpoint(path)
        self.header = self._read_header()
        self._bounds: dict[str, Bound] = {}
        self.base: Checkpoint | None = None
        self._model = describe({name: tuple(kept.shape) for name, kept in self.header.tensors.items()})
        for name, kept in self.header.tensors.items():
            self._check_parts(name, kept)

    def _read_header(self) -> _Header:
        text = self.checkpoint.metadata.get(_METADATA)
        if text is None:
            raise UserError(f"{self.path}: is no compressed store; `mergeline compress` makes one")
        try:
            found = parsed_json(text)
            version = found["format"]
            if version == _FORMAT:
                return _Header.model_validate(found)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise self._damaged(f"its description is malformed ({_first_line(error)})") from None
        raise UserError(
            f"{self.path}: is a store of format {version!r}, this Mergeline knows {_FORMAT}; update it"
        )

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: the store was damaged: {what}; copy it again")

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of each expert."""
        return [
            TensorSpec(name, kept.dtype, tuple(kept.shape), prod(kept.shape) * DTYPES[kept.dtype][1])
            for name, kept in self.header.tensors.items()
        ]

    def task(self, name: str) -> int:
        """The number of an expert."""
        experts = self.header.experts
        if name not in experts:
            raise UserError(f"{self.path}: holds no expert '{name}'{did_you_mean(name, experts)}")
        return experts.index(name)

    def _bound(self, name: str) -> Bound:
        kept = self.header.tensors[name]
        key = canonical_json(kept.params)
        if key not in self._bounds:
            method = get_method(self.header.method)
            if method.store is None:
                raise self._damaged(f"{method.id} is no method of stores")
            self._bounds[key] = bind(method, method.resolve({**self.header.params, **kept.params}))
        return self._bounds[key]

    def _pieces(self, name: str) -> list[View]:
        """A tensor, or the matrices that it consists of."""
        kept, experts = self.header.tensors[name], self.header.experts
        has_base = self.header.base is not None
        view = View(None, name, kept.shape, experts=experts, has_base=has_base, model=self._model)
        try:
            matrices = [Matrix(**{**m, "slab": tuple(m["slab"])}) for m in kept.matrices]
        except (TypeError, KeyError) as error:
            raise self._damaged(f"tensor '{name}' consists of no matrices ({error})") from None
        return [MatrixView(view, matrix) for matrix in matrices] or [view]

    def _pieces_shared(self, name: str) -> list[tuple[View, _Shared | None]]:
        """The same, with what each has in common with others."""
        pieces, shared = self._pieces(name), self.header.tensors[name].shared
        grouped = self._bound(name).stored_as(pieces[0]).group is not None and bool(pieces[0].elements)
        if len(shared) != (len(pieces) if grouped else 0):
            raise self._damaged(f"of tensor '{name}' it is not known what matrices have in common")
        return list(zip(pieces, shared)) if shared else [(piece, None) for piece in pieces]

    def _check_parts(self, name: str, kept: _Kept) -> None:
        if kept.dtype not in DTYPES or min(kept.shape, default=0) < 0:
            raise self._damaged(f"tensor '{name}' has dtype {kept.dtype} and shape {kept.shape}")
        shape, expected = tuple(kept.shape), []
        if kept.how == "copy":
            expected = [(_once("whole", name), shape, {kept.dtype})]
        elif kept.how == "parts":
            for piece, shared in self._pieces_shared(name):
                for key, part, _ in _parts_of(self._bound(name), piece, shared):
                    spec = _spec(key, part, {"number": "F32", "exact": "F32"})
                    expected.append((key, spec.shape, {"U8"} if part.kind == "bits" else set(FLOATS)))
        for key, shape, dtypes in expected:
            info = self.checkpoint.tensors.get(key)
            if info is None or info.shape != shape or info.dtype not in dtypes:
                raise self._damaged(f"'{key}' of shape {list(shape)} is not in it")

    def find_base(self, given: str | os.PathLike | None) -> Path | None:
        """Where the base lies: as given, or as the manifest says; None if none is needed."""
        if self.header.base is None:
            return None
        if given is not None:
            return Path(given)
        origin = read_manifest(self.path).get("recipe", {}).get("base") or {}
        if not isinstance(origin.get("path"), str):
            raise UserError(f"{self.path}: is relative to a base, which no manifest names; give --base")
        return (self.path if self.path.is_dir() else self.path.parent) / origin["path"]

    def open_base(self, path: Path | None) -> None:
        """Read the headers of the base, if one is needed."""
        self.base = open_checkpoint(path) if path else None

    def check_base(self) -> None:
        """Read the base, and refuse any but the one that the store was made with (raises UserError)."""
        if self.base is None:
            return
        if self.base.digest() != self.header.base:
            raise UserError(
                f"{self.base.path}: is not the base that the store was made with ({self.header.base})"
            )
        for name, kept in self.header.tensors.items():
            info = self.base.tensors.get(name)
            if kept.how != "copy" and (info is None or list(info.shape) != kept.shape):
                raise self._damaged(f"tensor '{name}' does not fit the base")

    def blocks(self, files: Files, spec: TensorSpec, task: int) -> Iterator[Tensor]:
        """One expert's tensor, block by block, not yet rounded."""
        name, kept = spec.name, self.header.tensors[spec.name]
        elements = prod(spec.shape)
        if kept.how != "parts":
            stored = self.checkpoint.tensors
            info = self._base_info(name) if kept.how == "base" else stored[_once("whole", name)]
            for start in range(0, elements, block_elements(1)):
                yield files.elements(info, start, min(start + block_elements(1), elements))
            return
        pieces = self._pieces_shared(name)
        if not isinstance(pieces[0][0], MatrixView):
            yield from self._decoded(files, spec, *pieces[0], task)
            return
        shared = {piece.name: of for piece, of in pieces}
        for slab, parts in by_stretch(piece for piece, _ in pieces):
            stretch = torch.empty(slab, dtype=torch.float64)
            for piece in parts:
                blocks = [
                    block.reshape(-1) for block in self._decoded(files, spec, piece, shared[piece.name], task)
                ]
                piece.matrix.put(stretch, torch.cat(blocks).double().reshape(piece.shape))
            yield stretch

    def _decoded(
        self, files: Files, spec: TensorSpec, piece: View, shared: _Shared | None, task: int
    ) -> Iterator[Tensor]:
        """One expert's tensor, or one matrix of it, block by block."""
        name, kept = spec.name, self.header.tensors[spec.name]
        bound, elements = self._bound(name), piece.elements
        dtype = getattr(torch, DTYPES[kept.read][0])
        whole = bound.unit(piece) == "tensor"
        step = max(elements, 1) if whole else -(-block_elements(1) // _BITS) * _BITS
        parts = list(_parts_of(bound, piece, shared))

        def part(key: str, what: Part, start: int, stop: int) -> Tensor:
            info = self.checkpoint.tensors[key]
            if what.kind == "bits":
                start, stop = (0, prod(what.shape)) if whole else (start, stop)
                return _unpacked(files.elements(info, start // _BITS, -(-stop // _BITS)), stop - start)
            if what.kind == "fact" or whole:
                return files.elements(info, 0, prod(info.shape)).reshape(info.shape)
            return files.elements(info, start, stop)

        for start in range(0, elements, step):
            stop = min(start + step, elements)
            base_X = None
            if self.base and name in self.base.tensors:
                base_X = self._base_block(files, piece, start, stop).to(dtype)
                base_X = base_X.reshape(piece.shape) if whole else base_X
            once, own = (
                {key.split("/")[1]: part(key, what, start, stop) for key, what, t in parts if t == owner}
                for owner in (None, task)
            )
            shape = piece.shape if whole else (stop - start,)
            yield bound.decode(piece, base_X, once, own, shape, dtype)

    def _base_info(self, name: str) -> TensorInfo:
        assert self.base is not None, "open_base opens it"
        return self.base.tensors[name]

    def _base_block(self, files: Files, piece: View, start: int, stop: int) -> Tensor:
        info = self._base_info(piece.stored_name)
        if not isinstance(piece, MatrixView):
            return files.elements(info, start, stop)
        return piece.matrix.read(partial(files.elements, info)).reshape(-1)[start:stop]


def _unpacked(packed: Tensor, count: int) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).bool()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {plainly(first)}"
    return str(error).partition("\n")[0]
