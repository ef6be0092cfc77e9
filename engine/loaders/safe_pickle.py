"""Reading other people's pickles without running them.

A pickle is a program. The machine here executes only what builds numpy arrays, numbers, text and plain containers:
every name a pickle asks for must be on `ALLOWED`, and what it gets under that name is a function of ours, never the
real callable. Instructions cannot cost more than the file's own size accounts for: texts are counted when they are
made, shared lists and texts each time they are referred to, nothing may hold itself, integers have at most 64 bits, and
keys are text or real numbers, or short tuples of them, few of which may share a hash. An array of numbers may be shared
by any number of rows and splits, since it is not copied.

Byte strings that Python 2 wrote become text: UTF-8, or Latin-1 where they are not that.

Large array payloads are not copied: they become read-only views of the file's bytes, which are mapped from a copy or
from the file itself, so that opening a 12 GB file costs what is later touched, not 12 GB of memory.
"""

from __future__ import annotations

import codecs
import gc
import math
import mmap
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.ragged import steady

LARGE = 1 << 16  # payloads from this size on are views of the file
MAX_DEPTH = 64
MAX_STEPS = 1 << 25  # a pickle of millions of instructions is no data set
MAX_CONTAINERS = 1 << 22
SHARING = 16  # how often, on average, a byte of the file may be referred to
SPARE = 1 << 26  # bytes that may be referred to besides, for small files
WIDEST_KEY = 8  # items of a tuple that is a key
TEXT_BYTES = 56  # what a text takes in memory besides its characters
SET_CONTAINERS = 4  # lists whose memory one set takes
ONE_HASH = 16  # keys of one hash: each is compared with all others

_HEADS = (
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "a web page, not the data",
        "Download the file itself (the link led to a page).",
    ),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the data", "Fetch the real file with `git lfs pull`."),
    (
        (b"pk\x03\x04",),
        "a zip archive or a torch.save file",
        "Unpack it, or save its contents as numpy arrays in a pickle.",
    ),
    ((b"\x1f\x8b",), "a gzip archive", "Unpack it first."),
    ((b"\x89hdf",), "an HDF5 file", "Give one of the formats that docs/formats.md lists."),
)


class _Refused(pickle.UnpicklingError):
    """The pickle asked for something that is not allowed; `name` says what."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Limit(pickle.UnpicklingError):
    """The pickle is beyond a limit of this reader.

    Args:
        found: what is there. rule: what is allowed. do: what to do about it.
    """

    def __init__(self, found: str, rule: str, do: str = "Save plain numpy arrays, text, numbers, lists and dicts."):
        super().__init__(found)
        self.found, self.rule, self.do = found, rule, do


class _Truncated(Exception):
    pass


class _ByteString(bytes):
    """A str of Python 2: the bytes of an array, or text."""

    __slots__ = ()

    def text(self) -> str:
        return decoded(bytes(self))


def decoded(raw: bytes) -> str:
    """Text of bytes: UTF-8, or Latin-1 where they are not that."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# What a pickle may build: stand-ins while loading, and the functions behind the allowed names.


class _Dtype:
    """Stands for numpy.dtype. A real dtype would accept forged flags and read raw bytes as pointers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str):  # the text of nested lists may have no end
            raise _Refused(f"a numpy dtype of a {type(code).__name__}")
        if not re.fullmatch(r"[<>=|]?[biufcSUO]\d{0,9}", code):
            raise _Refused(f"numpy dtype {code[:40]!r}")
        self.order = code[0] if code[0] in "<>=|" else "="
        self.code = code.lstrip("<>=|")

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.text() if isinstance(order, _ByteString) else order
        if order in ("<", ">", "=", "|"):
            self.order = order

    def numpy(self) -> np.dtype:
        return np.dtype("O") if self.code[0] == "O" else np.dtype(self.order + self.code)


class _Array:
    """Stands for an ndarray; `value` is the array once its state has been read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0)

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, (tuple, list)) or len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise pickle.UnpicklingError("an array without a shape")
    shape, kind = tuple(shape), dtype.numpy()
    count = math.prod(shape)
    if kind.hasobject:
        if not isinstance(raw, list) or len(raw) != count:
            raise pickle.UnpicklingError(f"an object array of shape {shape} without its {count} objects")
        flat = np.empty(count, dtype=object)
        for i, item in enumerate(raw):
            flat[i] = item
        return flat.reshape(shape, order=order)
    if not isinstance(raw, (bytes, bytearray, memoryview)) or len(raw) != count * kind.itemsize:
        size = len(raw) if hasattr(raw, "__len__") else 0
        raise pickle.UnpicklingError(f"an array of shape {shape} and dtype {kind} with {size} bytes of data")
    if count == 0 or kind.itemsize == 0:
        if max(shape, default=0) > 1 << 16 or count > 1 << 16:  # numpy gives elements of no width a width
            raise pickle.UnpicklingError(f"an array of shape {shape} without data")
        return np.zeros(shape, kind)
    array = np.frombuffer(raw, kind)
    if kind.kind == "U" and (array.view(kind.str[0] + "u4") > 0x10FFFF).any():
        raise pickle.UnpicklingError("text beyond Unicode")
    return array.reshape(shape, order=order)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or dtype.code[0] == "O":
        raise _Refused("a numpy scalar of objects")
    value = _array(raw, dtype, (), "C")[()]
    return np.str_(_text(value)) if isinstance(value, str) else value


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("a numpy array subclass")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: str = "C", axes: Any = None) -> np.ndarray:
    if order == "K" and axes is not None:
        axes = tuple(int(a) for a in axes)
        inner = _array(raw, dtype, [shape[a] for a in axes], "C")
        return inner.transpose(np.argsort(axes))
    return _array(raw, dtype, shape, "F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, (str, bytes)):
        raise _Refused("_codecs.encode of something that is no text")
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise _Refused(f"_codecs.encode to {encoding[:40]!r}")
    return text.encode(encoding)


def _bytes(kind: type) -> Callable:
    def build(raw: Any = b"", encoding: str = "latin1") -> Any:
        if not isinstance(raw, (bytes, bytearray, str, memoryview)):  # bytes(10**12) would allocate
            raise _Refused(f"{kind.__name__} of a {type(raw).__name__}")
        return kind(_encode(raw, encoding) if isinstance(raw, str) else raw)

    return build


def _set(kind: type) -> Callable:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise _Refused(f"a set of a {type(items).__name__}")
        return kind(map(_Hashes().key, items))

    return build


def _key(value: Any) -> Any:
    """`value` if it may be a key. Nested tuples may not: hashing one that is nested deeply overflows the stack."""
    if isinstance(value, _ByteString):
        return value.text()
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return value
    if type(value) is tuple and len(value) <= WIDEST_KEY and not any(type(item) is tuple for item in value):
        return tuple(map(_key, value))
    raise _Limit(
        f"a {value.dtype if isinstance(value, np.generic) else type(value).__name__} as a key",
        f"text, real numbers, or tuples of up to {WIDEST_KEY} of them as keys and in sets",
        "Save it under a name, or as a list.",
    )


class _Hashes:
    """Keys whose hashes an author can choose: of them, no more than `ONE_HASH` may share one.

    Python salts the hash of a text. That of a tuple of integers is known beforehand, and a dict of 70,000 tuples of one
    hash takes minutes.
    """

    def __init__(self) -> None:
        self.first: tuple[dict[int, Any], ...] = {}, {}  # scalars, and tuples: numpy would compare the two by element
        self.more: dict[tuple[bool, int], list[Any]] = {}

    def key(self, value: Any) -> Any:
        """`_key` of a value, counted.

        Raises:
            _Limit: it may not be a key, or is one too many of its hash.
        """
        value = _key(value)
        if type(value) is not tuple and not isinstance(value, np.generic):
            return value
        plural, number = type(value) is tuple, hash(value)
        first = self.first[plural].setdefault(number, value)
        if first is not value and first != value and value not in (more := self.more.setdefault((plural, number), [])):
            more.append(value)
            if len(more) > ONE_HASH:
                raise _Limit("keys that were chosen to have one hash", f"at most {ONE_HASH} keys of one hash")
        return value


def _ndarray(*_: Any) -> None:
    raise _Refused("numpy.ndarray called directly")


class _Function:
    """An allowed name. A wrapper, so that no result can hold the function itself."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable):
        self.name, self.call = name, call


def _functions() -> Iterable[tuple[str, str, Callable]]:
    yield "numpy", "ndarray", _ndarray
    yield "numpy", "dtype", _Dtype
    for package in ("numpy.core", "numpy._core"):
        yield f"{package}.multiarray", "_reconstruct", _reconstruct
        yield f"{package}.multiarray", "scalar", _scalar
        yield f"{package}.numeric", "_frombuffer", _frombuffer
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset):
            yield module, kind.__name__, _set(kind)
        for kind in (bytes, bytearray):
            yield module, kind.__name__, _bytes(kind)
    yield "_codecs", "encode", _encode


_FIXED = {(module, name): _Function(f"{module}.{name}", call) for module, name, call in _functions()}
_NDARRAY = _FIXED["numpy", "ndarray"]

ALLOWED: tuple[str, ...] = tuple(sorted(f.name for f in _FIXED.values()))
"""Every name a pickle may ask for."""


def _text(text: str) -> str:
    """`text` without lone surrogates, which could not be written to any file."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class _Machine:
    """Executes one pickle. Methods are named after the instructions of `pickletools`."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data, self.view, self.size, self.at = data, memoryview(data), len(data), 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.containers = 0
        self.spent = 0  # bytes that calls have copied
        self.held = 0  # bytes that texts take
        self.budget = SHARING * self.size + SPARE
        self.hashes = _Hashes()

    def run(self) -> Any:
        data, size, table = self.data, self.size, _TABLE
        for _ in range(MAX_STEPS):
            at = self.at
            if at >= size:
                raise _Truncated
            code = data[at]
            self.at = at + 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            execute = table[code]
            if execute is None:
                raise pickle.UnpicklingError(f"invalid load key {bytes(data[at : at + 1])!r} at byte {at}")
            execute(self)
        raise _Limit(
            f"more than {MAX_STEPS} instructions",
            f"at most {MAX_STEPS}",
            "Save numpy arrays: lists of numbers take an instruction a number.",
        )

    # -- reading arguments --

    def take(self, layout: struct.Struct) -> Any:
        end = self.at + layout.size
        if end > self.size:
            raise _Truncated
        (value,) = layout.unpack_from(self.data, self.at)
        self.at = end
        return value

    def raw(self, length: int) -> bytes:
        start = self.at
        end = start + length
        if end > self.size or length < 0:
            raise _Truncated
        self.at = end
        return self.data[start:end]

    def payload(self, length: int, kind: type = bytes) -> Any:
        if length < LARGE:
            raw = self.raw(length)
            return raw if kind is bytes else kind(raw)
        start = self.at
        if start + length > self.size:
            raise _Truncated
        self.at = start + length
        return self.view[start : self.at]

    def line(self, most: int = 1 << 30) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise _Truncated
        if end - self.at > most:
            raise _Limit("a number of too many digits", f"a number written in at most {most} characters")
        line = self.data[self.at : end]
        self.at = end + 1
        return line

    def push_text(self, raw: bytes) -> None:
        self.hold(raw)
        self.stack.append(raw.decode("utf-8", "replace"))

    def text_line(self) -> None:
        line = self.line()
        self.hold(line)
        self.stack.append(_text(line.decode("raw-unicode-escape")))

    def hold(self, raw: bytes) -> None:
        """Account for the memory of a text: that of two letters takes thirty times its place in the file."""
        if len(raw) > 1:  # Python keeps one object for each of the shorter ones
            self.held += len(raw) + TEXT_BYTES
            if self.held > self.budget:
                raise _Limit(
                    "texts that take far more memory than the file",
                    f"texts that take at most {SHARING} times its {self.size} bytes (and {SPARE >> 20} MiB)",
                    "Save them as one numpy array of text.",
                )

    def pop_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def new(self, container: Any) -> None:
        self.containers += SET_CONTAINERS if type(container) in (set, frozenset) else 1
        if self.containers > MAX_CONTAINERS:
            raise _Limit(
                f"more than {MAX_CONTAINERS} containers",
                f"at most {MAX_CONTAINERS} lists, tuples, dicts and sets",
                "Save numpy arrays instead of lists of lists.",
            )
        self.stack.append(container)

    # -- instructions --

    def proto(self) -> None:
        if self.raw(1)[0] > pickle.HIGHEST_PROTOCOL:
            raise pickle.UnpicklingError("a later protocol")

    def frame(self) -> None:
        if self.take(_U8) > self.size - self.at:
            raise _Truncated

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def dup(self) -> None:
        self.stack.append(self.stack[-1])

    def int_line(self) -> None:
        line = self.line(24)
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self.small(int(line)))

    def long_line(self) -> None:
        self.stack.append(self.small(int(self.line(24).rstrip(b"L"))))

    def long1(self) -> None:
        self.long(self.raw(1)[0])

    def long4(self) -> None:
        self.long(self.take(_I4))

    def long(self, length: int) -> None:
        self.stack.append(self.small(int.from_bytes(self.raw(min(length, 10)), "little", signed=True)))

    @staticmethod
    def small(value: int) -> int:
        if not -(1 << 63) <= value < 1 << 64:  # larger ones can be chosen such that all their hashes are equal
            raise _Limit("an integer of more than 64 bits", "integers of at most 64 bits")
        return value

    def float_line(self) -> None:
        self.stack.append(float(self.line(64)))

    def string(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            raise pickle.UnpicklingError("a string without quotes")
        self.push_bytes(codecs.escape_decode(line[1:-1])[0])

    def byte_string(self, length: int) -> None:
        raw = self.payload(length)
        self.stack.append(raw) if isinstance(raw, memoryview) else self.push_bytes(raw)

    def push_bytes(self, raw: bytes) -> None:
        self.hold(raw)
        self.stack.append(_SHORT[raw] if len(raw) < 2 else _ByteString(raw))

    def small_payload(self, length: int, kind: type = bytes) -> None:
        value = self.payload(length, kind)
        if not isinstance(value, memoryview):
            self.hold(value)
        self.stack.append(value)

    def append(self) -> None:
        value = self.stack.pop()
        self.list_at(-1).append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        self.list_at(-1).extend(items)

    def list_at(self, place: int) -> list:
        target = self.stack[place]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        return target

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.fill([key, value])

    def setitems(self) -> None:
        self.fill(self.pop_mark())

    def fill(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"keys for a {type(target).__name__}")
        for i in range(0, len(items), 2):
            target[self.hashes.key(items[i])] = items[i + 1]

    def dict_mark(self) -> None:
        items = self.pop_mark()
        self.new({})
        self.fill(items)

    def additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        target.update(map(self.hashes.key, items))

    def frozenset_mark(self) -> None:
        self.new(frozenset(map(self.hashes.key, self.pop_mark())))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.new(items)

    def put(self, index: int) -> None:
        most = min(self.size, MAX_STEPS)  # whoever numbers what is written gets no further
        if not 0 <= index <= most:
            raise _Limit(f"a memo of {index} entries", f"at most {most}")
        missing = index + 1 - len(self.memo)
        if missing > 0:
            self.memo += [_NOTHING] * missing
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if not 0 <= index < len(self.memo) or self.memo[index] is _NOTHING:
            raise pickle.UnpicklingError(f"no memo {index}")
        self.stack.append(self.memo[index])

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def name(self, module: str, name: str) -> None:
        try:
            self.stack.append(_FIXED[module, name])
        except KeyError:
            raise _Refused(f"{module[:80]}.{name[:80]}") from None

    def global_lines(self) -> None:
        self.name(self.line().decode("utf-8"), self.line().decode("utf-8"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a name that is no text")
        self.name(module, name)

    def inst(self) -> None:
        self.global_lines()
        function = self.stack.pop()
        self.call(function, tuple(self.pop_mark()))

    def obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.call(function, tuple(arguments))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def call(self, function: Any, arguments: Any) -> None:
        if type(function) is not _Function or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of a {type(function).__name__}")
        self.charge(arguments)
        self.new(function.call(*arguments))

    def charge(self, arguments: tuple) -> None:
        """Account for what a call copies. An argument may be an object that was read long ago: without an account, one
        long string could be copied once an instruction.
        """
        for a in arguments:
            if isinstance(a, (str, bytes, bytearray, memoryview)):
                self.spent += len(a)
            elif isinstance(a, (list, tuple, set, frozenset)):
                self.spent += SHARING * len(a)  # an item takes far longer than a byte
        if self.spent > self.budget:
            raise _Limit(
                "calls that copy more than the file holds",
                f"calls that copy at most {SHARING} times its {self.size} bytes (and {SPARE >> 20} MiB)",
            )

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (_Dtype, _Array)):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
        self.charge(state if isinstance(state, tuple) else ())
        target.build(state)


_NOTHING = object()  # a memo's entry that was not written
_SHORT = {raw: _ByteString(raw) for raw in (b"", *(bytes([i]) for i in range(256)))}
_U1, _U2, _U4, _U8 = (struct.Struct(f"<{c}") for c in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _refuse(name: str) -> Callable[[_Machine], None]:
    def execute(machine: _Machine) -> None:
        raise _Refused(f"the {name} instruction")

    return execute


def _table() -> list[Callable[[_Machine], None] | None]:
    m = _Machine

    def push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
        return lambda s: s.stack.append(read(s))

    instructions: dict[bytes, Callable[[_Machine], None]] = {
        b"\x80": m.proto, b"\x95": m.frame, b"(": m.mark, b"0": m.pop, b"1": m.pop_mark, b"2": m.dup,
        b"N": push(lambda s: None), b"\x88": push(lambda s: True), b"\x89": push(lambda s: False),
        b"I": m.int_line, b"L": m.long_line, b"J": push(lambda s: s.take(_I4)), b"K": push(lambda s: s.take(_U1)),
        b"M": push(lambda s: s.take(_U2)), b"\x8a": m.long1, b"\x8b": m.long4,
        b"F": m.float_line, b"G": push(lambda s: s.take(_F8)),
        b"S": m.string, b"T": lambda s: s.byte_string(s.take(_I4)), b"U": lambda s: s.byte_string(s.take(_U1)),
        b"V": m.text_line,
        b"X": lambda s: s.push_text(s.raw(s.take(_U4))), b"\x8c": lambda s: s.push_text(s.raw(s.take(_U1))),
        b"\x8d": lambda s: s.push_text(s.raw(s.take(_U8))),
        b"B": lambda s: s.small_payload(s.take(_U4)), b"C": lambda s: s.small_payload(s.take(_U1)),
        b"\x8e": lambda s: s.small_payload(s.take(_U8)), b"\x96": lambda s: s.small_payload(s.take(_U8), bytearray),
        b"]": lambda s: s.new([]), b"a": m.append, b"e": m.appends, b"l": lambda s: s.new(s.pop_mark()),
        b")": lambda s: s.stack.append(()), b"t": lambda s: s.new(tuple(s.pop_mark())),
        b"\x85": lambda s: s.tuple_of(1), b"\x86": lambda s: s.tuple_of(2), b"\x87": lambda s: s.tuple_of(3),
        b"}": lambda s: s.new({}), b"d": m.dict_mark, b"s": m.setitem, b"u": m.setitems,
        b"\x8f": lambda s: s.new(set()), b"\x90": m.additems, b"\x91": m.frozenset_mark,
        b"p": lambda s: s.put(int(s.line(20))), b"q": lambda s: s.put(s.take(_U1)), b"r": lambda s: s.put(s.take(_U4)),
        b"g": lambda s: s.get(int(s.line(20))), b"h": lambda s: s.get(s.take(_U1)), b"j": lambda s: s.get(s.take(_U4)),
        b"\x94": m.memoize, b"c": m.global_lines, b"\x93": m.stack_global, b"i": m.inst, b"o": m.obj, b"R": m.reduce,
        b"b": m.build,
    }  # fmt: skip
    refused = {b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"P": "PERSID", b"Q": "BINPERSID", b"\x82": "EXT1",
               b"\x83": "EXT2", b"\x84": "EXT4", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER"}  # fmt: skip
    instructions |= {code: _refuse(name) for code, name in refused.items()}
    return [instructions.get(bytes([i])) for i in range(256)]


_TABLE = _table()


_NUMBERS = {int, float, bool, type(None)}


class _Settle:
    """Replaces stand-ins by what they stand for, and counts what the result holds, once a reference to it.

    An array of numbers counts as a reference only: nobody copies it, however many rows share it.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.done: dict[int, tuple[Any, int] | None] = {}
        self.keep: list[Any] = []  # ids stay unique only while their objects live

    def __call__(self, value: Any, depth: int = 0) -> tuple[Any, int]:
        if type(value) is _Array:
            value = value.value
        kind = type(value)
        if kind is np.ndarray and value.dtype != object:
            return value, 8 + (value.nbytes if value.dtype.kind in "SU" else 0)
        if kind is _ByteString:
            return value.text(), len(value)
        if kind in (str, bytes, bytearray, memoryview):
            return value, len(value)
        if kind in (set, frozenset):
            if id(value) not in self.done:
                self.keep.append(value)
                self.done[id(value)] = value, 8 * len(value) + sum(len(i) for i in value if isinstance(i, (str, bytes)))
            return self.done[id(value)]
        if kind in (int, float, bool) or value is None or isinstance(value, np.generic):
            return value, 8
        if kind not in (dict, list, tuple, np.ndarray):
            raise pickle.UnpicklingError(f"a {kind.__name__.strip('_').lower()} where a value belongs")
        if id(value) in self.done:
            known = self.done[id(value)]
            if known is None:
                raise _Limit("a container that holds itself", "containers that do not hold themselves")
            return known
        if depth > MAX_DEPTH:
            raise _Limit(f"containers nested more than {MAX_DEPTH} deep", f"a depth of at most {MAX_DEPTH}")
        self.done[id(value)] = None
        self.keep.append(value)
        result, total = value, 8
        if kind is dict:
            for key, item in value.items():
                value[key], size = self(item, depth + 1)
                total += size + (len(key) if isinstance(key, (str, bytes)) else 8)
        elif kind is tuple:
            pairs = [self(item, depth + 1) for item in value]
            total += sum(size for _, size in pairs)
            result = tuple(item for item, _ in pairs)
        else:
            flat = value if kind is list else value.reshape(-1, order="A")
            kinds = set(map(type, flat))
            if kinds <= _NUMBERS:
                total += 8 * len(flat)
            elif kinds == {str}:
                total += sum(map(len, flat))
            else:
                for i, item in enumerate(flat):
                    flat[i], size = self(item, depth + 1)
                    total += size
        if total > self.limit:
            raise _Limit(
                f"lists and texts that are shared more often than {SHARING} times on average",
                f"lists and texts that count at most {SHARING} times the file's size (and {SPARE >> 20} MiB), each "
                "counted at every reference; an array of numbers may be shared freely",
                "Save what many rows share as one numpy array, or write it out for every row.",
            )
        self.done[id(value)] = (result, total)
        return result, total


def loads(data: mmap.mmap | bytes) -> Any:
    """Unpickle bytes or a mapped file under the allow-list; see `load`.

    Raises:
        Exception: of any kind for a damaged pickle; `load` makes them one `DataError`.
    """
    collects = gc.isenabled()
    gc.disable()  # it would look through millions of new lists again and again
    try:
        return _Settle(SHARING * len(data) + SPARE)(_Machine(data).run())[0]
    finally:
        if collects:
            gc.enable()


def load(path: str | Path) -> Any:
    """Unpickle `path` under the allow-list.

    Large arrays of the result are read-only views of the file's bytes, see `engine.loaders.ragged.steady`.

    Raises:
        DataError: not a pickle, damaged or truncated, it asks for a name that is not in `ALLOWED`, or it is beyond a
            limit, which the message tells.
    """
    path = Path(path)
    expected = "a pickle of numpy arrays, text and plain containers"
    try:
        if path.exists() and not path.is_file():
            raise OSError("no file")
        data = steady(path)
    except OSError as cause:
        raise DataError(
            str(path), f"{cause.strerror or cause}", "a readable file", "Check the path and its permissions."
        ) from cause
    if not data:
        raise DataError(str(path), "an empty file", expected, "Download or write the file again.")
    start = data[:64].lstrip().lower()
    for marks, found, do in _HEADS:
        if start.startswith(marks):
            raise DataError(str(path), found, expected, do)
    damaged = "Compare its size or checksum with the publisher's and download it again."
    try:
        return loads(data)
    except _Truncated:
        raise DataError(
            str(path), f"a pickle that ends early, after {len(data)} bytes", "a whole pickle", damaged
        ) from None
    except _Refused as refused:
        if "\r" in refused.name:
            raise DataError(
                str(path), "a pickle whose line ends were changed to those of Windows", "the bytes as written",
                "Copy it again as a binary file (git: `*.pkl binary` in .gitattributes).",
            ) from None  # fmt: skip
        advice = (
            "Save its tensors as numpy arrays."
            if refused.name.startswith("torch")
            else "Save its tables as numpy arrays and lists."
            if refused.name.startswith("pandas")
            else "Nothing was run. If you trust the file's author, ask for plain numpy arrays."
        )
        raise DataError(str(path), f"a pickle that asks for {refused.name}", expected, advice) from None
    except _Limit as limit:
        raise DataError(str(path), f"a pickle with {limit.found}", limit.rule, limit.do) from None
    except MemoryError:
        raise DataError(
            str(path), "a pickle larger than the free memory", expected, "Use a machine with more memory."
        ) from None
    except Exception as cause:  # a damaged pickle can fail in any way: IndexError, ValueError, KeyError, TypeError, ...
        raise DataError(str(path), f"a damaged or foreign pickle ({cause})", expected, damaged) from None
