"""What a pickle may build: the functions behind the allowed names, and stand-ins while it loads."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from engine.loaders.safe_pickle.limits import ONE_HASH, WIDEST_KEY, Limit, Refused


class ByteString(bytes):
    """A str of Python 2: the bytes of an array, or text."""

    __slots__ = ()

    def text(self) -> str:
        return decoded(bytes(self))


def decoded(raw: bytes) -> str:
    """Text of bytes: UTF-8, or Latin-1 if they are not UTF-8.

    >>> decoded(b"caf\\xe9")
    'café'
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def text_of(text: str) -> str:
    """`text` without lone surrogates, which no file could hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class Dtype:
    """Stands for numpy.dtype. A real dtype would accept forged flags and read raw bytes as pointers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str):  # the text of nested lists may have no end
            raise Refused(f"a numpy dtype of a {type(code).__name__}")
        if not re.fullmatch(r"[<>=|]?[biufcSUO]\d{0,9}", code):
            raise Refused(f"numpy dtype {code[:40]!r}")
        self.order = code[0] if code[0] in "<>=|" else "="
        self.code = code.lstrip("<>=|")

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.text() if isinstance(order, ByteString) else order
        if order in ("<", ">", "=", "|"):
            self.order = order

    def numpy(self) -> np.dtype:
        return np.dtype("O") if self.code[0] == "O" else np.dtype(self.order + self.code)


class Array:
    """Stands for an ndarray; `value` is the array once its state has been read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0)

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, Dtype):
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
        if max(shape, default=0) > 1 << 16 or count > 1 << 16:  # numpy would give a width to elements of no width
            raise pickle.UnpicklingError(f"an array of shape {shape} without data")
        return np.zeros(shape, kind)
    array = np.frombuffer(raw, kind)
    if kind.kind == "U" and (array.view(kind.str[0] + "u4") > 0x10FFFF).any():
        raise pickle.UnpicklingError("text beyond Unicode")
    return array.reshape(shape, order=order)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, Dtype) or dtype.code[0] == "O":
        raise Refused("a numpy scalar of objects")
    value = _array(raw, dtype, (), "C")[()]
    return np.str_(text_of(value)) if isinstance(value, str) else value


def _reconstruct(kind: Any, *_: Any) -> Array:
    if kind is not _NDARRAY:
        raise Refused("a numpy array subclass")
    return Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: str = "C", axes: Any = None) -> np.ndarray:
    if order == "K" and axes is not None:
        axes = tuple(int(a) for a in axes)
        inner = _array(raw, dtype, [shape[a] for a in axes], "C")
        return inner.transpose(np.argsort(axes))
    return _array(raw, dtype, shape, "F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, (str, bytes)):
        raise Refused("_codecs.encode of something that is no text")
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Refused(f"_codecs.encode to {encoding[:40]!r}")
    return text.encode(encoding)


def _bytes(kind: type) -> Callable:
    def build(raw: Any = b"", encoding: str = "latin1") -> Any:
        if not isinstance(raw, (bytes, bytearray, str, memoryview)):  # bytes(10**12) would allocate
            raise Refused(f"{kind.__name__} of a {type(raw).__name__}")
        return kind(_encode(raw, encoding) if isinstance(raw, str) else raw)

    return build


def _set(kind: type) -> Callable:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise Refused(f"a set of a {type(items).__name__}")
        return kind(map(Hashes().key, items))

    return build


def _key(value: Any) -> Any:
    """`value` if it may be a key. Nested tuples may not: hashing deeply nested ones overflows the stack."""
    if isinstance(value, ByteString):
        return value.text()
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return value
    if type(value) is tuple and len(value) <= WIDEST_KEY and not any(type(item) is tuple for item in value):
        return tuple(map(_key, value))
    raise Limit(
        f"a {value.dtype if isinstance(value, np.generic) else type(value).__name__} as a key",
        f"text, real numbers, or tuples of up to {WIDEST_KEY} of them as keys and in sets",
        "Save it under a name, or as a list.",
    )


class Hashes:
    """Counts keys whose hash an author can choose: no more than `ONE_HASH` of them may share one.

    Python salts the hash of a text, but not that of a tuple of integers. A dict of 70,000 tuples of one hash takes
    minutes.
    """

    def __init__(self) -> None:
        self.first: tuple[dict[int, Any], ...] = (
            {},
            {},
        )  # scalars and tuples apart: numpy compares elements
        self.more: dict[tuple[bool, int], list[Any]] = {}

    def key(self, value: Any) -> Any:
        """`_key` of a value, counted.

        Raises:
            Limit: it may not be a key, or too many keys share its hash.
        """
        value = _key(value)
        if type(value) is not tuple and not isinstance(value, np.generic):
            return value
        plural, number = type(value) is tuple, hash(value)
        first = self.first[plural].setdefault(number, value)
        if first is not value and first != value and value not in (more := self.more.setdefault((plural, number), [])):
            more.append(value)
            if len(more) > ONE_HASH:
                raise Limit("keys that were chosen to have one hash", f"at most {ONE_HASH} keys of one hash")
        return value


def _ndarray(*_: Any) -> None:
    raise Refused("numpy.ndarray called directly")


class Function:
    """An allowed name. It wraps the function, so that no result can hold the function itself."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable):
        self.name, self.call = name, call


def _functions() -> Iterable[tuple[str, str, Callable]]:
    yield "numpy", "ndarray", _ndarray
    yield "numpy", "dtype", Dtype
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


FIXED = {(module, name): Function(f"{module}.{name}", call) for module, name, call in _functions()}
_NDARRAY = FIXED["numpy", "ndarray"]

ALLOWED: tuple[str, ...] = tuple(sorted(f.name for f in FIXED.values()))
"""Every name a pickle may ask for."""
