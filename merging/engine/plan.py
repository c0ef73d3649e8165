"""The plan of a merge: what will be read, computed and written, and every problem, as headers say it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

from mergeline.merging.algebra.slots import MASK_BYTES, Unit, View, block_elements
from mergeline.merging.algebra.statistics import STATISTICS
from mergeline.merging.architecture import Model
from mergeline.merging.checkpoints.adapters import ADAPTER_WEIGHTS
from mergeline.merging.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergeline.merging.checkpoints.companions import stem_of
from mergeline.merging.checkpoints.components import configurations
from mergeline.merging.checkpoints.quantised.rounding import rows_together
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor
from mergeline.merging.checkpoints.remote import AHEAD_BYTES, is_remote
from mergeline.merging.checkpoints.router import Router
from mergeline.merging.checkpoints.task_adapters import TaskAdapter
from mergeline.merging.checkpoints.vocabulary import Alignment
from mergeline.merging.checkpoints.writer import TensorSpec
from mergeline.merging.engine.inputs import Stamp
from mergeline.merging.engine.stack import Stack
from mergeline.merging.errors import UserError
from mergeline.merging.methods.bound import Bound, bind
from mergeline.merging.methods.contract import Method
from mergeline.merging.recipes.recipe import Recipe

_BLOCK_BUFFERS = 12  # float64 intermediates of the size of a block of all experts
_TENSOR_BUFFERS = 6  # float64 intermediates of the size of a tensor, whatever the number of experts
_SQUARE_BUFFERS = 4  # float64 matrices as large as the smaller side squared
_KEPT_BYTES = 1 << 26  # freed memory that the C library keeps for a worker (machine.keep_freed_memory)
_BYTES_PER_SECOND = 1e9  # a reading: bring, hash, convert and combine on one core
_FLOPS_PER_SECOND = 5e10  # float64 on one core

# merge: from all experts. copy: from its source, all of which must agree. largest: of integer counters.
Action = Literal["merge", "copy", "largest"]


@dataclass(frozen=True)
class Entry:
    """One output tensor, and what is read for it.

    sources: expert name -> tensor; empty where only the base's is used. bound: the method and parameters it is merged
    with. model: what the tensors of the output are. lacks: kinds of statistics that its method reads where there are
    any, and of which there are none of it. form: the tensor to whose quantised format it is rounded.
    """

    action: Action
    spec: TensorSpec
    sources: dict[str, TensorInfo]
    base: TensorInfo | None
    bound: Bound | None = None
    model: Model | None = None
    lacks: tuple[str, ...] = ()
    form: QuantisedTensor | None = None

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """What is written, by its names in the file."""
        if self.form is None:
            return {self.name: self.spec}
        return {
            part.name: TensorSpec(part.name, part.dtype, part.shape, part.nbytes) for part in self.form.parts
        }

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def inputs(self) -> list[TensorInfo]:
        return [*self.sources.values(), *([self.base] if self.base else [])]

    @property
    def origins(self) -> dict[str, TensorInfo]:
        """What is read, by expert name or `base`."""
        return {**({"base": self.base} if self.base else {}), **self.sources}

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of what it is made from."""
        return {info.dtype for info in self.inputs}

    @cached_property
    def header(self) -> View:
        """The tensor without its data."""
        experts, has_base = list(self.sources), self.base is not None
        return View(None, self.name, self.spec.shape, experts=experts, has_base=has_base, model=self.model)

    @property
    def unit(self) -> Unit | None:
        """The blocks it is merged in; None if it is copied."""
        return self.bound.unit(self.header) if self.bound else None

    @property
    def readings(self) -> int:
        """About how often each input is read: looks over the tensor and over the model come before the merge."""
        if self.bound is None:
            return 1
        return 1 + self.bound.looks_at_tensors + 3 * self.bound.looks_at_model

    @property
    def treatment(self) -> str:
        """What really happens to it, in few words."""
        if self.bound is not None:
            without = [f"no {kind}" for kind in self.lacks]
            return ", ".join([self.bound.treatment(self.header), *without])
        if self.action == "largest":
            return "largest count"
        if not self.sources:
            return "base"
        return (
            f"kept from {next(iter(self.sources))}"
            if len(self.sources) == 1 and not self.base
            else "as it is"
        )

    @property
    def peak_bytes(self) -> int:
        """Memory that merging it takes, without the imports."""
        return self._merging_bytes + max((info.computing_bytes for info in self.inputs), default=0)

    @property
    def _merging_bytes(self) -> int:
        if (
            self.form is not None
        ):  # as it is without, and float32 copies of the rows that are rounded together
            rows = 8 * 4 * min(rows_together(self.form) * (1, *self.spec.shape)[-1], prod(self.spec.shape))
            return replace(self, form=None)._merging_bytes + with_kept(rows)
        count, elements = len(self.sources), prod(self.spec.shape)
        if self.bound is None:
            return 4 * block_elements(1) * 8
        if self.unit != "tensor":
            width = self.spec.shape[-1] if self.unit == "row" and self.spec.shape else 1
            masks = min(elements * count // 8, MASK_BYTES) if self.bound.looks_at_tensors else 0
            return min(max(block_elements(count), width), elements) * (count + 1) * 8 * _BLOCK_BUFFERS + masks
        return with_kept(8 * max(self._held(piece) for piece in self.bound.pieces(self.header)))

    def _held(self, piece: View) -> int:
        """Float64 numbers that are held of a tensor that is merged as a whole."""
        assert self.bound is not None
        count, elements = len(self.sources), prod(piece.shape)
        square = min(piece.shape) ** 2 if len(piece.shape) == 2 else 0
        for kind in self.bound.statistics:
            if STATISTICS[kind].squared_side:
                square = max(square, prod(STATISTICS[kind].shape(piece.shape, piece.inputs)))
        changed = count + 2 if self.bound.changes else 0  # experts and bases that wrappers changed
        stretch = 0 if piece is self.header else 2 * elements
        beside = self.bound.beside(piece.shape, count)
        return (_TENSOR_BUFFERS + changed) * elements + _SQUARE_BUFFERS * square + beside + stretch


@dataclass
class Plan:
    """A recipe resolved against real headers. `problems` stop the merge; `warnings` do not."""

    recipe: Recipe
    method: Method | None = None
    params: dict[str, Any] = field(default_factory=dict)
    base: Checkpoint | None = None
    experts: dict[str, Checkpoint] = field(default_factory=dict)
    onto: dict[str, Checkpoint] = field(default_factory=dict)  # what adapters add to that is not the base
    statistics: dict[str, list[Checkpoint]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    model: Model | None = None  # what the tensors are
    donor: Path | None = None  # the folder whose configuration and tokenizer are carried over
    alignment: Alignment | None = None  # of vocabularies that differ
    stack: Stack | None = None  # of ranges of layers
    adapter_only: bool = False  # of adapters without a base, which can become nothing else
    keeps_adapters: bool = False  # of adapters that are merged as they lie, and stay an adapter
    # what becomes of config.json where another kind, or size, of model is written
    configured: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    untied: str | None = None  # an output matrix of its own, of a base whose embedding is it
    adapters: dict[str, TaskAdapter] = field(default_factory=dict)  # that lie beside the merge, by task
    router: Router | None = None  # that lies beside a store
    heads: dict[str, list[str]] = field(default_factory=dict)  # that lie beside the merge: expert -> tensors
    stamps: dict[Path, Stamp] = field(
        default_factory=dict
    )  # of the files that are read, at their headers' reading
    read_as: list[str] = field(
        default_factory=list
    )  # sentences on inputs that are read as what they stand for
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def bound(self) -> Bound:
        """The method with the parameters of the recipe, before any rule."""
        assert self.method is not None, "the plan has problems"
        return bind(self.method, self.params)

    @cached_property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The configurations of the components of what is written, by what stands before names of tensors."""
        return configurations(self.donor) if self.donor else {"": {}}

    @property
    def components(self) -> list[str]:
        """The names of the components of what is written; none of one checkpoint."""
        return [prefix.rstrip("/") for prefix in self.parts if prefix]

    @property
    def stems(self) -> dict[str, str]:
        """How names of files of weights begin, by the same."""
        if self.keeps_adapters and self.donor:
            return {"": ADAPTER_WEIGHTS.removesuffix(".safetensors")}
        return {prefix: stem_of(config) for prefix, config in self.parts.items()}

    @property
    def is_spectral(self) -> bool:
        """Whether matrices are decomposed."""
        return bool(self.method) and self.bound.is_spectral

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """What is read, by expert name or `base`."""
        return {**({"base": self.base} if self.base else {}), **self.experts}

    @property
    def merged(self) -> list[Entry]:
        """What is merged by the recipe's method."""
        return [e for e in self.entries if e.bound and e.bound.method is self.method]

    def statistics_of(self, kind: str, key: str) -> tuple[Checkpoint, str]:
        """The file of a statistics tensor, and its name there: one file for all experts has keys `INDEX/TENSOR`."""
        files = self.statistics[kind]
        expert, _, name = key.partition("/")
        if len(files) > 1 or len(self.experts) == 1 and expert == "0" and key not in files[0].tensors:
            return files[int(expert)], name
        return files[0], key

    def statistic(self, kind: str, key: str) -> TensorInfo:
        """Where a tensor of the statistics lies (raises UserError if it is missing)."""
        checkpoint, name = self.statistics_of(kind, key)
        if name not in checkpoint.tensors:
            raise UserError(f"{checkpoint.path}: statistics '{kind}': tensor '{name}' is missing")
        return checkpoint.tensors[name]

    def check(self) -> None:
        """Raises UserError with the first problem, if there is one."""
        if self.problems:
            more = len(self.problems) - 1
            raise UserError(self.problems[0] + (f" (and {more} more: see `mergeline plan`)" if more else ""))

    @property
    def bytes_read(self) -> int:
        return sum(t.nbytes for e in self.entries for t in e.inputs)

    @property
    def bytes_over_network(self) -> int:
        """About what a merge reads of checkpoints whose headers alone are here: each reading, and all for digests."""
        read = sum(e.readings * info.bytes_in(self._is_remote) for e in self.entries for info in e.inputs)
        known = {(info.file, info.start) for e in self.entries for info in e.inputs}
        return read + sum(
            info.bytes_in(self._is_remote)
            for checkpoint in self._stored
            for info in checkpoint.stored.tensors.values()
            if (info.file, info.start) not in known
        )

    @property
    def _stored(self) -> list[Checkpoint]:
        """All that is read, statistics too."""
        return [*self.checkpoints.values(), *(c for files in self.statistics.values() for c in files)]

    @property
    def bytes_written(self) -> int:
        return sum(part.nbytes for e in self.entries for part in e.parts.values())

    @cached_property
    def peak_bytes(self) -> int:
        """Memory of one worker at the tensor that takes most, without the imports."""
        return max((entry.peak_bytes + self._read_ahead(entry) for entry in self.entries), default=0)

    def _read_ahead(self, entry: Entry) -> int:
        """Memory for what comes over the network, of each input."""
        return sum(min(info.bytes_in(self._is_remote), AHEAD_BYTES) for info in entry.inputs)

    @cached_property
    def _remotes(self) -> set[Path]:
        folders = {info.file.parent for c in self._stored for info in c.stored.tensors.values()}
        return {folder for folder in folders if is_remote(folder)}

    def _is_remote(self, file: Path) -> bool:
        return file.parent in self._remotes

    @property
    def seconds(self) -> float:
        """A rough estimate for one core."""
        bytes_read = flops = 0.0
        for entry in self.entries:
            bytes_read += entry.readings * sum(info.nbytes for info in entry.inputs)
            if entry.bound and entry.bound.is_spectral and entry.unit == "tensor":
                for piece in entry.bound.pieces(entry.header):
                    small, *_, large = sorted(piece.shape)
                    flops += len(entry.sources) * (2.0 * large * small**2 + 6.0 * small**3)
        return bytes_read / _BYTES_PER_SECOND + flops / _FLOPS_PER_SECOND

    def treatments(self) -> dict[str, int]:
        """How many tensors get which treatment."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.treatment] = found.get(entry.treatment, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def table(self) -> Iterator[dict[str, Any]]:
        """What becomes of every tensor: its action and treatment, method and parameters."""
        for entry in self.entries:
            row: dict[str, Any] = {"tensor": entry.name, "shape": list(entry.spec.shape)}
            row |= {"action": entry.action, "treatment": entry.treatment}
            if entry.bound:
                row |= {"method": entry.bound.method.id, "params": entry.bound.flat}
            yield row

    def summary(self) -> dict[str, Any]:
        """What `mergeline plan` prints."""
        copied = sum(e.action != "merge" for e in self.entries)
        return {
            "method": self.recipe.method,
            "params": self.params,
            "tensors": {"merge": len(self.entries) - copied, "copy": copied},
            "treatments": self.treatments(),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
            "warnings": self.warnings,
        }


def with_kept(used: int) -> int:
    """So many bytes that a worker uses, and what of them the C library keeps when they are freed."""
    return used + min(used, _KEPT_BYTES)
