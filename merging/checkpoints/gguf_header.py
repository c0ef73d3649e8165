"""Headers of GGUF files, read without believing them: settings, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Not by
`gguf.GGUFReader`, which counts to whatever number the file names.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from mergeline.merging.checkpoints.remote import true_size
from mergeline.merging.errors import UserError
from mergeline.merging.reading import open_regular

MAGIC = b"GGUF"
# Types of settings, by the number that the file has for them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Types of tensors: number -> (name, elements of a block, bytes of it), as ggml.c has them.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
PLAIN = ("F32", "F16", "F64", "BF16")  # as safetensors has them
PACKED = tuple(name for name, *_ in _TYPES.values() if name not in PLAIN)
_SIZES = {name: (elements, size) for name, elements, size in _TYPES.values()}
_MOST_DIMENSIONS, _MOST_NAME, _MOST_ALIGNMENT = 4, 1 << 16, 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """Bytes [start, stop) of the file; shape: slowest dimension first, as torch has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """settings: keys and values; None of arrays, which are those of tokenizers, and of long texts."""

    settings: dict[str, Any]
    tensors: list[StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins like one."""
    with open_regular(path) as file:
        return file.read(4) == MAGIC


def elements_of(type: str, bytes: int) -> int:
    """How many elements are in so many bytes of a type."""
    elements, size = _SIZES[type]
    return bytes // size * elements


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        UserError: it is cut off, of another version, holds types that are not known, or tensors that overlap.
    """
    with open_regular(path) as file:
        here = os.fstat(file.fileno()).st_size
        return _Reader(file, path, true_size(path, here), here).header()


def header_length(start: bytes, size: int, named: str) -> int | None:
    """How long the header of a file is that begins so, with what pads it; None if it goes on after that.

    size: of the file. named: what errors call it.

    Raises:
        UserError: as `read_header`.
    """
    reader = _Reader(BytesIO(start), named, size, len(start))
    try:
        reader.header()
    except _GoesOn:
        return None
    return reader.data


class _GoesOn(UserError):
    """The header goes on after what is here of the file."""


class _Reader:
    """data: where the header ends, once it was read."""

    def __init__(self, file: BinaryIO, path: Path | str, size: int, here: int):
        """size: of the whole file, of whose beginning so much is `here`."""
        self.file, self.path, self.size, self.here = file, path, size, here
        self.data = 0

    def bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: malformed GGUF header ({what}); download it again")

    def header(self) -> Header:
        if self.bytes(4) != MAGIC:
            raise self.bad("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF of version {version} (or big-endian) cannot be read; convert it again"
            )
        tensors, settings = self.count(24), self.count(12)
        found: dict[str, Any] = {}
        for _ in range(settings):
            key = self.text()
            value = self.setting(self.number("I"))
            if key in found:
                raise self.bad(f"'{key}' is there twice")
            found[key] = value
        rows = [self.tensor() for _ in range(tensors)]
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self.bad(f"alignment {alignment!r}")
        self.data = min(-(-self.file.tell() // alignment) * alignment, self.size)
        return Header(found, self.placed(rows, self.data, alignment))

    def bytes(self, count: int) -> bytes:
        self.refuse_beyond(count)
        return self.file.read(count)

    def refuse_beyond(self, count: int) -> None:
        """Raises UserError unless so many bytes are left."""
        if count > self.size - self.file.tell():
            raise self.bad("it ends before it is complete")
        if count > self.here - self.file.tell():
            raise _GoesOn(f"{self.path}: its header goes on after what is here; remove the folder")

    def number(self, kind: str) -> Any:
        [value] = struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))
        return value

    def count(self, size: int) -> int:
        """A number of things, each of which takes at least `size` bytes of what is left of the file."""
        count = int(self.number("Q"))
        if count * size > self.size:
            raise self.bad(f"{count} entries do not fit into it")
        return count

    def text(self) -> str:
        length = int(self.number("Q"))
        if length > _MOST_NAME:
            raise self.bad(f"a name of {length} bytes")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError:
            raise self.bad("a name that is no UTF-8") from None

    def setting(self, kind: int) -> Any:
        """A value; None of an array or a long text, which are passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = int(self.number("Q"))
            if length <= _MOST_NAME:
                return self.bytes(length).decode(errors="replace")
            self.skip(length)
            return None
        if kind != _ARRAY:
            raise self.bad(f"a setting of type {kind}")
        inner = self.number("I")
        if inner in _SCALARS:
            self.skip(int(self.number("Q")) * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(self.count(8)):
                self.skip(int.from_bytes(self.bytes(8), "little"))
        else:
            raise self.bad(f"an array of type {inner}")
        return None

    def skip(self, count: int) -> None:
        self.refuse_beyond(count)
        self.file.seek(count, os.SEEK_CUR)

    def tensor(self) -> tuple[str, int, list[int], int]:
        name, count = self.text(), self.number("I")
        if count > _MOST_DIMENSIONS:
            raise self.bad(f"tensor '{name}' has {count} dimensions")
        shape = [int(self.number("Q")) for _ in range(count)]
        return name, self.number("I"), shape, int(self.number("Q"))

    def placed(
        self, rows: list[tuple[str, int, list[int], int]], data: int, alignment: int
    ) -> list[StoredTensor]:
        """The tensors at their places in the file, none of which may overlap another."""
        found: dict[str, StoredTensor] = {}
        for name, kind, sizes, offset in rows:
            if name in found:
                raise self.bad(f"tensor '{name}' is there twice")
            if kind not in _TYPES:
                raise UserError(
                    f"{self.path}: tensor '{name}' has the GGUF type {kind}, which cannot be read; "
                    "take a file of another quantisation"
                )
            type, elements, size = _TYPES[kind]
            shape = tuple(reversed(sizes))
            if prod(shape) >= 1 << 62 or 0 in shape or (shape[-1] if shape else 1) % elements:
                raise self.bad(f"tensor '{name}' of type {type} has the shape {list(shape)}")
            length = prod(shape) // elements * size
            start = data + offset
            if offset % alignment or start + length > self.size:
                raise self.bad(f"tensor '{name}' lies beyond the end of the file, or between its places")
            found[name] = StoredTensor(name, type, shape, start, start + length)
        end = 0
        for tensor in sorted(found.values(), key=lambda t: t.start):
            if tensor.start < end:
                raise self.bad(f"tensor '{tensor.name}' overlaps its neighbour")
            end = tensor.stop
        return list(found.values())
