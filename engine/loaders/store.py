"""The store: one ragged, memory-mapped safetensors file, whatever the format of the source.

Tensors of each split S:

- `S/label` float32 [N, 1]; NaN where a sample has none;
- `S/audio/values` float32 (or float16) [total, d] and `S/audio/offsets` int64 [N + 1]; the same for vision;
- `S/tokens/values` int32 [total] and offsets: with special tokens, not cut;
- `S/ids/values` and `S/text/values` uint8 (UTF-8) and offsets;
- `S/features/values` float32 (or float16) [total, d_t] and offsets: only if precomputed text features were asked for.

The metadata entry `engine_store` is a JSON object: version, source format and fingerprint, length rule, tokeniser, what
was cleaned, and a sha256 of every tensor. `engine convert` adds the sha256 of every source file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import DataError, OutputError
from engine.files import atomic_file, parse_json, user_path
from engine.loaders.content import SplitData, StoreData
from engine.loaders.formats.checks import SPLITS
from engine.loaders.ragged import Ragged
from engine.loaders.spool import release

VERSION = 2  # 1 took the padding to be at the format's side, whatever the zeros said
KEY = "engine_store"
FILE = "store.safetensors"
HEADER_BYTES = 1 << 26  # the header holds one checksum per source file
CHUNK = 1 << 24  # bytes that are written or hashed at a time

_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_NUMPY = {name: np.dtype(kind) for kind, name in _TYPES.items()}


def store_path(path: str | Path) -> Path:
    """The file of the store that `path` names, directly or by its folder. It need not be there yet."""
    path = user_path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def is_store(path: str | Path) -> bool:
    """Whether `path` is a store (or a safetensors file in its place)."""
    return store_path(path).is_file()


def write_store(path: str | Path, data: StoreData, dtype: Literal["float32", "float16"] | None = None) -> Path:
    """Write a store atomically. Returns its file.

    Arrays go to the file piece by piece; the safetensors library would first copy all of them into memory.

    Args:
        dtype: of frames and text features; None keeps theirs.

    Raises:
        DataError: the folder cannot be written to, there is no space, float16 cannot hold a value, or the store that
            the data comes from has changed.
    """
    path = store_path(path)
    tensors = {}
    for key, array in data.tensors():
        kind = array.dtype if dtype is None or array.dtype.kind != "f" or key.endswith("/label") else np.dtype(dtype)
        tensors[key] = array, kind
    # widest types first, so that every tensor is aligned
    order = sorted(tensors, key=lambda k: -tensors[k][1].itemsize)
    sums = dict.fromkeys(order, "0" * 64)  # known when all is written; the header keeps room for them
    meta = {**data.meta, "checksums": sums}
    room = len(_header(meta, tensors, order))
    try:
        with atomic_file(path) as file:
            file.seek(room)
            for key in order:
                digest = hashlib.sha256()
                for piece in _pieces(*tensors[key], f"{path}, {key}"):
                    file.write(piece)
                    digest.update(piece)
                sums[key] = digest.hexdigest()
            for split in data.splits.values():
                split.check()
            file.seek(0)
            file.write(_header(meta, tensors, order))
    except OutputError as problem:
        raise no_room(problem) from problem
    return path


def no_room(problem: OutputError) -> DataError:
    """The error of a store that could not be written."""
    return DataError(problem.where, problem.found, problem.expected, "Free space or name another place for the store.")


def _header(meta: dict[str, Any], tensors: dict[str, tuple[np.ndarray, np.dtype]], order: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(meta)}}
    at = 0
    for key in order:
        array, kind = tensors[key]
        size = array.size * kind.itemsize
        header[key] = {"dtype": _TYPES[kind.name], "shape": list(array.shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _pieces(array: np.ndarray, kind: np.dtype, where: str) -> Iterator[memoryview]:
    """The bytes of an array as `kind`, piece by piece. The memory of mapped files is given back."""
    rows = max(1, CHUNK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(part, kind)
        if kind == np.float16 != array.dtype and not np.isfinite(block).all():
            raise DataError(
                where, "values beyond ±65504, the range of float16", "values in its range", "Convert to fp32 instead."
            )
        if block.size:
            yield block.reshape(-1).view(np.uint8).data
        release(part)


class _File:
    """A mapped safetensors file of a store.

    If the file is cut off, reading past its new end kills the process. So `check` asks the system whether the file is
    still the one that was opened. A file that was replaced by another one stays readable.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            if HEADER_BYTES < int.from_bytes(file.read(8), "little") <= path.stat().st_size:
                raise ValueError(f"a header of more than {HEADER_BYTES} bytes")
        with safe_open(str(path), framework="numpy") as checked:  # offsets and sizes fit together
            metadata = checked.metadata() or {}
        self.path, self._file = path, path.open("rb")
        weakref.finalize(self, self._file.close)  # else Python warns of an open file
        self._state = self._stat()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._map[:8])
        self._start = 8 + length
        self._entries = parse_json(self._map[8 : self._start])
        self._entries.pop("__metadata__", None)
        self.meta = parse_json(metadata[KEY])

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def check(self) -> None:
        """Raise DataError if the file has changed since it was opened."""
        now = self._stat()
        if now != self._state:
            found = f"{now[0]} bytes" if now[0] != self._state[0] else "a later time of writing"
            raise DataError(
                str(self.path), f"a store that was written to while in use ({found})",
                f"the file as it was opened ({self._state[0]} bytes)",
                "Run `engine inspect --verify` on it, or convert the data again, and start again.",
            )  # fmt: skip

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        return list(self._entries)

    def tensor(self, key: str) -> np.ndarray:
        """A read-only view of a tensor.

        Raises:
            KeyError: there is no such tensor. ValueError: a store has no tensors of its type.
        """
        entry = self._entries[key]
        if entry["dtype"] not in _NUMPY:
            raise ValueError(f"{key} of dtype {entry['dtype']}")
        begin, end = entry["data_offsets"]
        kind = _NUMPY[entry["dtype"]]
        if (self._start + begin) % kind.itemsize:
            raise ValueError(f"{key} is not aligned")
        count = (end - begin) // kind.itemsize
        if not count:
            return np.zeros(entry["shape"], kind)
        return np.frombuffer(self._map, kind, count, self._start + begin).reshape(entry["shape"])


class _Splits(Mapping):
    """The splits of an open store. Each one is read when it is first asked for."""

    def __init__(self, file: _File, names: list[str]):
        self._file, self._names = file, names
        self._read: dict[str, SplitData] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> SplitData:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            self._file.check()
            try:
                self._read[name] = self._load(name)
            except (KeyError, ValueError, IndexError, TypeError) as cause:
                raise _damaged(self._file.path, cause) from None
            self._file.check()
        return self._read[name]

    def _ragged(self, key: str) -> Ragged | None:
        if f"{key}/values" not in self._file:
            return None
        values, offsets = (self._file.tensor(f"{key}/{part}") for part in ("values", "offsets"))
        offsets = np.array(offsets)  # only frames stay in the file; they are read under `check`
        if values.dtype.kind != "f":
            values = np.array(values)
        if offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets of {key} do not fit its values")
        return Ragged(values, offsets)

    def _strings(self, key: str) -> list[str] | None:
        packed = self._ragged(key)
        if packed is None:
            return None
        raw = packed.values.tobytes()
        return [raw[a:b].decode("utf-8") for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]

    def _load(self, name: str) -> SplitData:
        label = np.array(self._file.tensor(f"{name}/label"))
        parts = {k: self._ragged(f"{name}/{k}") for k in ("audio", "vision", "tokens", "features")}
        split = SplitData(
            self._strings(f"{name}/ids") or [], self._strings(f"{name}/text"), label, **parts,
            check=self._file.check, reopen=partial(_open_split, str(self._file.path), name),
        )  # fmt: skip
        if any(len(p) != len(split) for p in (label, *(p for p in parts.values() if p is not None))):
            raise ValueError(f"split {name} has parts of different lengths")
        for key, part in parts.items():
            number, kind = (1, "i") if key == "tokens" else (2, "f")
            if part is None and key in ("audio", "vision"):
                raise ValueError(f"split {name} has no {key}")
            if part is not None and (part.values.ndim, part.values.dtype.kind) != (number, kind):
                raise ValueError(f"{name}/{key} of shape {part.values.shape} and dtype {part.values.dtype}")
        if label.shape != (len(split), 1) or label.dtype != np.float32:
            raise ValueError(f"{name}/label of shape {label.shape} and dtype {label.dtype}")
        return split


def _open_split(path: str, name: str) -> SplitData:
    return open_store(path).splits[name]


def _damaged(path: Path, cause: object) -> DataError:
    return DataError(
        str(path), f"a damaged store ({cause})", "a store made by `engine convert`", "Delete it and convert again."
    )


def open_store(path: str | Path) -> StoreData:
    """Open a store. Its arrays are views of the mapped file.

    Raises:
        DataError: it is not a store, is damaged, or is of another version.
    """
    return _open(store_path(path))[1]


def _open(path: Path) -> tuple[_File, StoreData]:
    try:
        file = _File(path)
        meta = file.meta
        version = int(meta["version"])
        _ = meta["counts"]
    except KeyError:
        raise DataError(
            str(path), "a safetensors file of another kind", "a store made by `engine convert`",
            "Name the data's own file.",
        ) from None  # fmt: skip
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, OverflowError) as cause:
        raise _damaged(path, cause) from None
    if version != VERSION:
        maker = f" (engine {meta['engine']})" if "engine" in meta else ""
        newer = version > VERSION
        raise DataError(
            str(path),
            f"store version {version}{maker}",
            f"version {VERSION}",
            "Update engine, or convert the original files again with this version."
            if newer
            else "Convert the data again with this version of engine.",
        )
    if not _described(meta):
        raise _damaged(path, "a description of another form")
    return file, StoreData(meta, _Splits(file, [name for name in SPLITS if name in meta["counts"]]))


def _described(meta: dict[str, Any]) -> bool:
    """Whether a store's description has all that is read from it, in the types in which it was written."""
    counts = meta["counts"]
    return (
        all(isinstance(meta.get(key), str) for key in ("format", "source", "fingerprint", "length_rule"))
        and isinstance(meta.get("notes"), list)
        and isinstance(meta.get("checksums"), dict)
        and isinstance(meta.get("sha256", {}), dict)
        and isinstance(meta.get("tokenizer", 0), (dict, type(None)))
        and is_named(meta.get("columns", {}))
        and isinstance(counts, dict)
        and bool(counts)
        and set(counts) <= set(SPLITS)
        and all(
            isinstance(split.get(kind), dict) and all(isinstance(n, int) for n in split[kind].values())
            for split in counts.values()
            for kind in ("nonfinite", "missing", "dropped")
        )
    )


def is_named(columns: Any) -> bool:
    """Whether a value from a file can be the names of feature columns by modality."""
    return isinstance(columns, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in columns.values()
    )


def verify_store(path: str | Path) -> list[str]:
    """The tensors of a store whose checksum does not match. Reads the whole file, piece by piece.

    Raises:
        DataError: it is not a store, is damaged, or was written to meanwhile.
    """
    file, data = _open(store_path(path))
    sums = data.meta.get("checksums") or {}
    wrong = [key for key in sums if key not in file]
    for key in file.keys():
        file.check()
        digest = hashlib.sha256()
        try:
            array = file.tensor(key)
        except ValueError as cause:
            raise _damaged(file.path, cause) from None
        for piece in _pieces(array, array.dtype, key):
            digest.update(piece)
            file.check()
        if digest.hexdigest() != sums.get(key):
            wrong.append(key)
    return wrong
