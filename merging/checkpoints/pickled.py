"""Pickles read as data: what they hold is listed, and nothing that they name is imported, made or called.

A pickle is a program for a stack machine, whose instructions `GLOBAL`, `REDUCE`, `NEWOBJ` and `BUILD` name, call and
change objects of Python (https://docs.python.org/3/library/pickletools.html). Here they write down what they would do,
as `Name` and `Made`, and who reads the file looks whether that is what the format has. Instructions that plain files
have no need of are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct, error
from typing import Any, Callable

_MARK = object()
_U2, _U4, _U8, _I4, _F8 = (Struct(form) for form in ("<H", "<I", "<Q", "<i", ">d"))
_MOST_LONG_BYTES = 16  # of an integer
_MOST_OF_A_NAME = 1000  # bytes of a module and what is in it


class Unreadable(ValueError):
    """Bytes that are no pickle, or one with instructions that are not read."""


@dataclass(frozen=True)
class Name:
    """What a pickle wants imported: `module.name`."""

    text: str


class Made:
    """What calling `name` with `args` would make; `state` is what would be set on it.

    name: a `Name`, where it is what a file should have.
    """

    __slots__ = ("name", "args", "state")

    def __init__(self, name: Any, args: Any):
        self.name, self.args = name, args
        self.state: Any = None


class Entries(list[tuple[Any, Any]]):
    """A dictionary: its keys and values in the order of the file; nothing was hashed."""


class Stored:
    """What stands outside the pickle, by its identity there."""

    __slots__ = ("identity",)

    def __init__(self, identity: Any):
        self.identity = identity


class _Machine:
    """The stack machine; every instruction is a method of the position after it, and gives the next position."""

    def __init__(self, data: bytes):
        self.data, self.stack, self.memo = data, list[Any](), dict[int, Any]()
        self.stopped = False

    def take(self, at: int, size: int) -> bytes:
        if size > len(self.data) - at:
            raise Unreadable("it ends too early")
        return self.data[at : at + size]

    def push(self, value: Any, at: int) -> int:
        self.stack.append(value)
        return at

    def text(self, at: int, size: int) -> int:
        return self.push(self.take(at, size).decode("utf-8", "surrogatepass"), at + size)

    def bytes_(self, at: int, size: int) -> int:
        return self.push(self.take(at, size), at + size)

    def to_mark(self) -> list[Any]:
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                found = stack[i + 1 :]
                del stack[i:]
                return found
        raise Unreadable("a mark is missing")

    def memoize(self, key: int, at: int) -> int:
        self.memo[key] = self.stack[-1]
        return at

    def tuple_of(self, count: int, at: int) -> int:
        if len(self.stack) < count:
            raise Unreadable("its stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]
        return at

    def call(self, at: int) -> int:
        args = self.stack.pop()
        self.stack[-1] = Made(self.stack[-1], args)
        return at

    def build(self, at: int) -> int:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Made) or made.state is not None:
            raise Unreadable("it sets the state of what has none")
        made.state = state
        return at

    def extend(self, values: list[Any], at: int) -> int:
        into = self.stack[-1]
        if type(into) is not list:
            raise Unreadable("it appends to what is no list")
        into += values
        return at

    def enter(self, values: list[Any], at: int) -> int:
        into = self.stack[-1]
        if not isinstance(into, Entries) or len(values) % 2:
            if not isinstance(into, Made) or len(values) % 2:  # an OrderedDict is made, then filled
                raise Unreadable("it sets items of what is no dictionary")
            into.state = into.state if isinstance(into.state, Entries) else Entries()
            into = into.state
        into += zip(values[::2], values[1::2])
        return at

    def named(self, at: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Unreadable("a name is no text")
        return self.push(Name(f"{module}.{name}"), at)

    def lines(self, at: int) -> int:
        parts = self.data[at : at + _MOST_OF_A_NAME].split(b"\n", 2)
        if len(parts) < 3:
            raise Unreadable("a name does not end")
        module, name = (part.decode() for part in parts[:2])
        return self.push(Name(f"{module}.{name}"), at + len(parts[0]) + len(parts[1]) + 2)

    def long(self, at: int, size: int) -> int:
        if size > _MOST_LONG_BYTES:
            raise Unreadable("an integer has too many digits")
        return self.push(int.from_bytes(self.take(at, size), "little", signed=True), at + size)

    def stop(self, at: int) -> int:
        self.stopped = True
        return at


_Instruction = Callable[[_Machine, int], int]
_INSTRUCTIONS: dict[int, _Instruction] = {
    b"\x80"[0]: lambda m, at: at + 1,  # PROTO
    b"\x95"[0]: lambda m, at: at + 8,  # FRAME
    b"."[0]: _Machine.stop,
    b"("[0]: lambda m, at: m.push(_MARK, at),
    b"N"[0]: lambda m, at: m.push(None, at),
    b"\x88"[0]: lambda m, at: m.push(True, at),
    b"\x89"[0]: lambda m, at: m.push(False, at),
    b"J"[0]: lambda m, at: m.push(_I4.unpack_from(m.data, at)[0], at + 4),
    b"K"[0]: lambda m, at: m.push(m.data[at], at + 1),
    b"M"[0]: lambda m, at: m.push(_U2.unpack_from(m.data, at)[0], at + 2),
    b"\x8a"[0]: lambda m, at: m.long(at + 1, m.data[at]),
    b"G"[0]: lambda m, at: m.push(_F8.unpack_from(m.data, at)[0], at + 8),
    b"\x8c"[0]: lambda m, at: m.text(at + 1, m.data[at]),
    b"X"[0]: lambda m, at: m.text(at + 4, _U4.unpack_from(m.data, at)[0]),
    b"\x8d"[0]: lambda m, at: m.text(at + 8, _U8.unpack_from(m.data, at)[0]),
    b"C"[0]: lambda m, at: m.bytes_(at + 1, m.data[at]),
    b"B"[0]: lambda m, at: m.bytes_(at + 4, _U4.unpack_from(m.data, at)[0]),
    b"}"[0]: lambda m, at: m.push(Entries(), at),
    b"]"[0]: lambda m, at: m.push([], at),
    b")"[0]: lambda m, at: m.push((), at),
    b"t"[0]: lambda m, at: m.push(tuple(m.to_mark()), at),
    b"\x85"[0]: lambda m, at: m.tuple_of(1, at),
    b"\x86"[0]: lambda m, at: m.tuple_of(2, at),
    b"\x87"[0]: lambda m, at: m.tuple_of(3, at),
    b"a"[0]: lambda m, at: m.extend([m.stack.pop()], at),
    b"e"[0]: lambda m, at: m.extend(m.to_mark(), at),
    b"s"[0]: lambda m, at: m.enter([m.stack.pop(), m.stack.pop()][::-1], at),
    b"u"[0]: lambda m, at: m.enter(m.to_mark(), at),
    b"\x94"[0]: lambda m, at: m.memoize(len(m.memo), at),
    b"q"[0]: lambda m, at: m.memoize(m.data[at], at + 1),
    b"r"[0]: lambda m, at: m.memoize(_U4.unpack_from(m.data, at)[0], at + 4),
    b"h"[0]: lambda m, at: m.push(m.memo[m.data[at]], at + 1),
    b"j"[0]: lambda m, at: m.push(m.memo[_U4.unpack_from(m.data, at)[0]], at + 4),
    b"c"[0]: _Machine.lines,
    b"\x93"[0]: _Machine.named,
    b"R"[0]: _Machine.call,
    b"\x81"[0]: _Machine.call,  # NEWOBJ
    b"b"[0]: _Machine.build,
    b"Q"[0]: lambda m, at: m.push(Stored(m.stack.pop()), at),
}


def read_pickle(data: bytes) -> Any:
    """What a pickle holds, as plain values, `Entries`, and `Name` and `Made` where it names code.

    A value may hold itself: who looks into it goes no deeper than the format does.

    Raises:
        Unreadable: it is no pickle, or one with instructions that are not read.
    """
    machine, at = _Machine(data), 0
    try:
        while not machine.stopped:
            instruction = _INSTRUCTIONS.get(data[at])
            if instruction is None:
                raise Unreadable(f"the instruction {data[at]:#04x} is not read")
            at = instruction(machine, at + 1)
        [value] = machine.stack
    except (IndexError, KeyError, ValueError, error) as cause:
        raise Unreadable(str(cause) if isinstance(cause, Unreadable) else "it is damaged") from None
    return value
