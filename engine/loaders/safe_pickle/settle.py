"""The last step: stand-ins become what they stand for, and the size of the result is counted."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from engine.loaders.safe_pickle.limits import MAX_DEPTH, SHARING, SPARE, Limit
from engine.loaders.safe_pickle.values import Array, ByteString

_NUMBERS = {int, float, bool, type(None)}


class Settle:
    """Replaces stand-ins by what they stand for, and counts what the result holds, once per reference.

    An array of numbers counts as one reference only: nobody copies it, however many rows share it.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.done: dict[int, tuple[Any, int] | None] = {}
        self.keep: list[Any] = []  # ids stay unique only while their objects live

    def __call__(self, value: Any, depth: int = 0) -> tuple[Any, int]:
        if type(value) is Array:
            value = value.value
        kind = type(value)
        if kind is np.ndarray and value.dtype != object:
            return value, 8 + (value.nbytes if value.dtype.kind in "SU" else 0)
        if kind is ByteString:
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
                raise Limit("a container that holds itself", "containers that do not hold themselves")
            return known
        if depth > MAX_DEPTH:
            raise Limit(f"containers nested more than {MAX_DEPTH} deep", f"a depth of at most {MAX_DEPTH}")
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
            raise Limit(
                f"lists and texts that are shared more often than {SHARING} times on average",
                f"lists and texts that count at most {SHARING} times the file's size (and {SPARE >> 20} MiB), each "
                "counted at every reference; an array of numbers may be shared freely",
                "Save what many rows share as one numpy array, or write it out for every row.",
            )
        self.done[id(value)] = (result, total)
        return result, total
