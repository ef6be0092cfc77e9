"""Reading other people's pickles without running them.

A pickle is a program. This reader allows it to build numpy arrays, numbers, text and plain containers, and nothing
else: every name it asks for must be on `ALLOWED`, and what it gets under that name is a stand-in of ours, never the
real callable. Large array payloads are not copied into memory: they become read-only views of the memory-mapped file,
so that opening a 12 GB file costs what is later touched, not 12 GB.
"""

import io
import mmap
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError

LARGE = 1 << 16  # payloads from this size on are mapped; standard picklers leave them outside frames from here on
MAX_DEPTH = 64

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
    ((b"\x89hdf",), "an HDF5 file", "Give one of the formats that docs/data.md lists."),
)


class _Refused(pickle.UnpicklingError):
    """The pickle asked for something that is not allowed; `name` says what."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Allowed:
    """A callable a pickle may use. It has no attributes that the pickle's BUILD instruction could change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state given to a function")


class _Dtype:
    """Stands for numpy.dtype while loading. A real dtype would accept forged flags and read raw bytes as pointers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[<>=|]?[biufcSUO]\d{0,9}", code):
            raise _Refused(f"numpy dtype {code!r}")
        self.order = code[0] if code[0] in "<>=|" else "="
        self.code = code.lstrip("<>=|")

    def __setstate__(self, state: tuple) -> None:
        if len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype("O") if self.code[0] == "O" else np.dtype(self.order + self.code)


class _Array:
    """Stands for an ndarray while loading; `value` is the array once its state has been read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    shape = tuple(int(n) for n in shape)
    kind = dtype.numpy()
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if any(n < 0 for n in shape):
        raise pickle.UnpicklingError(f"an array of shape {shape}")
    if kind.hasobject:
        if not isinstance(raw, list) or len(raw) != count:
            raise pickle.UnpicklingError(f"an object array of shape {shape} without its {count} objects")
        flat = np.empty(count, dtype=object)
        for i, item in enumerate(raw):
            flat[i] = item
        return flat.reshape(shape, order=order)
    if isinstance(raw, str):  # bytes written by Python 2
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray, memoryview)) or len(raw) != count * kind.itemsize:
        size = len(raw) if hasattr(raw, "__len__") else 0
        raise pickle.UnpicklingError(f"an array of shape {shape} and dtype {kind} with {size} bytes of data")
    if count == 0 or kind.itemsize == 0:
        if count > 1 << 24:  # numpy gives elements of no width a width
            raise pickle.UnpicklingError(f"an array of shape {shape} without data")
        return np.zeros(shape, kind)
    return np.frombuffer(raw, kind).reshape(shape, order=order)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or dtype.code[0] == "O":
        raise _Refused("a numpy scalar of objects")
    return _array(raw, dtype, (), "C")[()]


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
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode(encoding)


def _bytes(kind: type) -> Callable:
    def build(*args: Any) -> Any:
        if args and isinstance(args[0], int):  # bytes(10**12) would allocate
            raise _Refused(f"{kind.__name__} of a given size")
        return kind(*args)

    return build


_NDARRAY = _Allowed(lambda *_: _raise(_Refused("numpy.ndarray called directly")))


def _raise(error: Exception) -> None:
    raise error


_FIXED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Allowed(_Dtype)}
for _package in ("numpy.core", "numpy._core"):
    _FIXED[f"{_package}.multiarray", "_reconstruct"] = _Allowed(_reconstruct)
    _FIXED[f"{_package}.multiarray", "scalar"] = _Allowed(_scalar)
    _FIXED[f"{_package}.numeric", "_frombuffer"] = _Allowed(_frombuffer)
for _module in ("builtins", "__builtin__"):
    for _kind in (list, dict, tuple, set, frozenset):
        _FIXED[_module, _kind.__name__] = _Allowed(_kind)
    for _kind in (bytes, bytearray):
        _FIXED[_module, _kind.__name__] = _Allowed(_bytes(_kind))
_FIXED["_codecs", "encode"] = _Allowed(_encode)

ALLOWED: tuple[str, ...] = tuple(sorted(f"{module}.{name}" for module, name in _FIXED))
"""Every name a pickle may ask for."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, payloads: list[memoryview]):
        super().__init__(stream, encoding="latin1")
        self._payloads = payloads

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _FIXED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, number: Any) -> memoryview:
        return self._payloads[number]


_LENGTH = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
_OPCODES = {ord(op.code): (op.name, None if op.arg is None else op.arg.n) for op in pickletools.opcodes}
_PAYLOADS = {"BINBYTES", "BINBYTES8", "BYTEARRAY8"}


class _Truncated(Exception):
    pass


def _scan(data: mmap.mmap) -> tuple[bytes, list[memoryview]]:
    """Walk the instructions without executing any: bounds are checked, large payloads are taken out.

    Returns the stream to execute, in which payload i is the persistent object i, and the payloads.
    """
    size, at, steps, frame_end = len(data), 0, 0, 0
    view = memoryview(data)
    small, payloads, copied = io.BytesIO(), [], 0
    while True:
        if at >= size:
            raise _Truncated
        start = at
        known = _OPCODES.get(data[at])
        if known is None:
            raise pickle.UnpicklingError(f"invalid load key {bytes(data[at : at + 1])!r} at byte {at}")
        name, argument = known
        at += 1
        steps += 1
        if argument is None:
            pass
        elif argument >= 0:
            at += argument
        elif argument == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if name in ("GLOBAL", "INST") else 1):
                at = data.find(b"\n", at) + 1
                if at == 0:
                    raise _Truncated
        else:
            layout = _LENGTH[argument]
            width = struct.calcsize(layout)
            if at + width > size:
                raise _Truncated
            (length,) = struct.unpack_from(layout, data, at)
            at += width + max(length, 0)
            if name in _PAYLOADS and length >= LARGE and start >= frame_end and at <= size:
                small.write(view[copied:start])
                small.write(b"J" + struct.pack("<i", len(payloads)) + b"Q")
                payloads.append(view[at - length : at])
                copied = at
        if at > size:
            raise _Truncated
        if name == "FRAME":
            frame_end = at + struct.unpack_from("<Q", data, start + 1)[0]
            if frame_end > size:
                raise _Truncated
        elif name == "LONG_BINPUT" and struct.unpack_from("<I", data, start + 1)[0] > steps:
            # the C unpickler allocates a table of this size
            raise pickle.UnpicklingError("a memo index beyond the number of objects")
        elif name == "PUT" and len(data[start + 1 : at].strip()) > 9:
            raise pickle.UnpicklingError("a memo index beyond the number of objects")
        elif name in ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"):
            raise _Refused(f"the {name} instruction")
        elif name == "STOP":
            small.write(view[copied:at])
            return small.getvalue(), payloads


def _settle(value: Any, done: dict[int, Any], keep: list, depth: int = 0) -> Any:
    """Replace the stand-ins for arrays by the arrays, inside containers too."""
    if isinstance(value, _Array):
        value = value.value
    kind = type(value)
    if kind not in (dict, list, tuple) and not (kind is np.ndarray and value.dtype == object):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"containers nested more than {MAX_DEPTH} deep")
    done[id(value)] = value
    keep.append(value)  # ids stay unique only while their objects live
    if kind is dict:
        for key, item in value.items():
            value[key] = _settle(item, done, keep, depth + 1)
    elif kind is tuple:
        done[id(value)] = tuple(_settle(item, done, keep, depth + 1) for item in value)
    else:
        flat = value if kind is list else value.reshape(-1, order="A")
        for i, item in enumerate(flat):
            flat[i] = _settle(item, done, keep, depth + 1)
    return done[id(value)]


def load(path: str | Path) -> Any:
    """Unpickle `path` under the allow-list.

    Large arrays of the result are read-only views of the mapped file.

    Raises:
        DataError: not a pickle, damaged or truncated, or it asks for a name that is not in `ALLOWED`.
    """
    path = Path(path)
    expected = "a pickle of numpy arrays, text and plain containers"
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if not head:
                raise DataError(str(path), "an empty file", expected, "Download or write the file again.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as cause:
        raise DataError(
            str(path), f"{cause.strerror or cause}", "a readable file", "Check the path and its permissions."
        ) from cause
    start = head.lstrip().lower()
    for marks, found, do in _HEADS:
        if start.startswith(marks):
            raise DataError(str(path), found, expected, do)
    damaged = "Compare its size or checksum with the publisher's and download it again."
    try:
        stream, payloads = _scan(data)
        return _settle(_Unpickler(io.BytesIO(stream), payloads).load(), {}, [])
    except _Truncated:
        raise DataError(
            str(path), f"a pickle that ends early, after {len(data)} bytes", "a whole pickle", damaged
        ) from None
    except _Refused as refused:
        advice = (
            "Save its tensors as numpy arrays."
            if refused.name.startswith("torch")
            else "Save its tables as numpy arrays and lists."
            if refused.name.startswith("pandas")
            else "Nothing was run. If you trust the file's author, ask for plain numpy arrays."
        )
        raise DataError(str(path), f"a pickle that asks for {refused.name}", expected, advice) from None
    except MemoryError:
        raise DataError(
            str(path), "a pickle larger than the free memory", expected, "Use a machine with more memory."
        ) from None
    except RecursionError:
        raise DataError(str(path), "containers nested too deep", expected, damaged) from None
    except Exception as cause:  # a damaged pickle can fail in any way: EOFError, ValueError, KeyError, TypeError, ...
        raise DataError(str(path), f"a damaged or foreign pickle ({cause})", expected, damaged) from None
