"""Where the blocks of a merged tensor go: to its place in the file, rounded once; or, with scales, to two places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.quantised.rounding import rounded_rows, rows_together
from mergeline.merging.checkpoints.writer import CheckpointWriter
from mergeline.merging.engine.blocks import rounded, torch_dtype
from mergeline.merging.engine.plan import Entry
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergeline.merging.checkpoints.checkpoint import TensorInfo


class Sink:
    """A tensor that is written as it is computed, in its dtype."""

    def __init__(self, writer: CheckpointWriter, entry: Entry):
        self.entry, self.writer = entry, writer.open(entry.name)

    def append(self, block: Tensor) -> None:
        """The next elements (raises UserError if they overflow the dtype)."""
        spec = self.entry.spec
        self.writer.append(block if block.dtype == torch_dtype(spec) else rounded(block, spec))

    def close(self) -> dict[str, str]:
        """All elements are written; returns the hash of each part."""
        return {self.entry.name: self.writer.close()}

    @property
    def error(self) -> list[float]:
        """Sums of squares, of what requantising changed and of the tensor; empty of what was not requantised."""
        return []


class RequantisedSink(Sink):
    """A tensor that is rounded to a quantised format, as many rows as have scales in common at a time."""

    def __init__(self, writer: CheckpointWriter, entry: Entry, form: TensorInfo):
        self.entry, self.form = entry, form
        self.writers = [writer.open(part) for part in entry.parts]
        self.width = (1, *entry.spec.shape)[-1]
        self.rows, self.matrix = rows_together(form), (1, 1, *entry.spec.shape)[-2]
        self.apart = self.size = 0.0
        self._at = 0  # rows that are written
        self._waiting: list[Tensor] = []
        self._count = 0  # elements that wait

    def append(self, block: Tensor) -> None:
        self._waiting.append(block.detach().to("cpu", torch.float32).reshape(-1))
        self._count += self._waiting[-1].numel()
        while self._count >= (length := self._next() * self.width) and length:
            values = torch.cat(self._waiting)
            self._waiting, self._count = [values[length:]], self._count - length
            self._write(values[:length].reshape(-1, self.width))

    def _next(self) -> int:
        """The rows that are rounded together next: no more than the matrix has left, unless all have one scale."""
        if self.rows > self.matrix:
            return self.rows
        return min(self.rows, self.matrix - self._at % self.matrix)

    def _write(self, values_MN: Tensor) -> None:
        parts, read_MN = rounded_rows(self.form, values_MN)
        if not bool(torch.isfinite(read_MN).all()):
            raise UserError(f"tensor '{self.entry.name}' overflows its scales; leave out --requantise")
        for writer, part in zip(self.writers, parts):
            writer.append(part)
        self.apart += float((read_MN.double() - values_MN).square().sum())
        self.size += float(values_MN.double().square().sum())
        self._at += len(values_MN)

    def close(self) -> dict[str, str]:
        return {part: writer.close() for part, writer in zip(self.entry.parts, self.writers)}

    @property
    def error(self) -> list[float]:
        return [self.apart, self.size]


def sink_of(writer: CheckpointWriter, entry: Entry) -> Sink:
    """Where a tensor of the plan is written."""
    return RequantisedSink(writer, entry, entry.form) if entry.form else Sink(writer, entry)
