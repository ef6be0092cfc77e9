"""One ragged, memory-mapped store for every format: a safetensors file.

Tensors, for each split S:

- `S/label` float32 [N, 1];
- `S/audio/values` float32 [total, d] and `S/audio/offsets` int64 [N + 1]; the same for vision;
- `S/tokens/values` int32 [total] and offsets: special tokens included, not cut;
- `S/ids/values` and `S/text/values` uint8 (UTF-8) and offsets;
- `S/features/values` float32 [total, d_t] and offsets, only where precomputed text features were asked for.

The metadata entry `engine_store` is a JSON object: version, source format and fingerprint, length rule, tokeniser, what
was cleaned, and a sha256 of every tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import DataError, OutputError
from engine.files import atomic_path
from engine.loaders.formats import SPLITS, RawDataset, Source
from engine.loaders.ragged import LengthRule, Ragged
from engine.loaders.text import Tokenizer

VERSION = 1
KEY = "engine_store"
FILE = "store.safetensors"
HEAD_BYTES = 1 << 20

_TYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "uint8": "U8"}


@dataclass
class SplitData:
    """One split, not normalised, possibly memory-mapped.

    Attributes:
        ids, text: N names; N transcripts or None.
        label: float32 [N, 1].
        audio, vision: float32 ragged [total, d]; a missing modality is one zero frame.
        tokens: int32 ragged or None. features: float32 ragged [total, d_t] or None.
        check: raises DataError where the arrays are views of a file that has changed since it was opened; asked
            before they are read.
    """

    ids: list[str]
    text: list[str] | None
    label: np.ndarray
    audio: Ragged
    vision: Ragged
    tokens: Ragged | None = None
    features: Ragged | None = None
    check: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class StoreData:
    """Splits and what is known of them (see the module's text for `meta`)."""

    meta: dict[str, Any]
    splits: Mapping[str, SplitData]


def store_path(path: str | Path) -> Path:
    """The store's file where `path` names a store or its folder, or would after writing."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def is_store(path: str | Path) -> bool:
    """Whether `path` is a store (or a safetensors file in its place)."""
    return store_path(path).is_file()


def fingerprint(source: Source, beside: list[Path]) -> str:
    """Changes whenever a source file does: sha256 of names, sizes, times and first MiB of its files and of `beside`.

    Of the source's further parts, which may be a file a sample, only names, sizes and times count.
    """
    digest = hashlib.sha256()
    for part in source.parts:
        state = part.stat()
        digest.update(f"{part} {state.st_size} {state.st_mtime_ns} ".encode())
    for file in [*source.files.values(), *beside]:
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD_BYTES))
    return digest.hexdigest()


def prepare(source: Source, raw: RawDataset, rule: LengthRule, tokenizer: Tokenizer | None, mark: str) -> StoreData:
    """Check what a reader returned and make it store content. `mark` is the source's fingerprint.

    Raises:
        DataError: see `problems`.
    """
    found = problems(raw, str(source.path))
    if found:
        raise found[0]
    splits, counts = {}, {}
    for name, split in raw.splits.items():
        text = split.text
        splits[name] = SplitData(
            split.ids,
            text,
            split.label,
            split.audio.ragged,
            split.vision.ragged,
            tokenizer.encode(text, raw.draws_words) if tokenizer is not None and text is not None else None,
            split.features.ragged if split.features else None,
        )
        counts[name] = {
            "samples": len(split.ids),
            "nonfinite": {"audio": split.audio.nonfinite, "vision": split.vision.nonfinite},
            "missing": {
                "audio": len(split.audio.missing),
                "vision": len(split.vision.missing),
                "text": sum(not t.strip() for t in text) if text is not None else 0,
            },
        }
    meta = {
        "version": VERSION,
        "format": raw.format,
        "source": source.path.name,
        "fingerprint": mark,
        "length_rule": rule,
        "tokenizer": describe_tokenizer(tokenizer),
        "dtypes": raw.dtypes,
        "choice": asdict(source.choice),
        "draws_words": raw.draws_words,
        "cut": raw.cut,
        "counts": counts,
        "notes": raw.notes,
    }
    return StoreData(meta, splits)


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """What a store records of the tokeniser that made its tokens."""
    if tokenizer is None:
        return None
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "pad_id": tokenizer.pad_id,
        "closing_id": tokenizer.closing_id,
    }


def problems(raw: RawDataset, where: str) -> list[DataError]:
    """What keeps a data set from being used: duplicate ids, widths that differ between splits, no texts."""
    found = []
    seen: dict[str, tuple[str, int]] = {}
    for name, split in raw.splits.items():
        for row, sample in enumerate(split.ids):
            if sample in seen:
                other, first = seen[sample]
                found.append(
                    DataError(
                        f"{where}, {name}, row {row}",
                        f"id {sample} a second time",
                        f"every id once ({other}, row {first} has it)",
                        "Remove one of them.",
                    )
                )
            else:
                seen[sample] = (name, row)
        if split.text is not None and not any(t.strip() for t in split.text):
            found.append(
                DataError(
                    f"{where}, {name}",
                    "no text in any sample",
                    "transcripts",
                    "Give a file with transcripts, or text_encoder=features.",
                )
            )
        if split.features is not None and len(split.features.missing) == len(split.ids):
            found.append(
                DataError(
                    f"{where}, {name}/text",
                    "zeros in all text features",
                    "precomputed text features, as text_encoder=features says",
                    "Name a text encoder.",
                )
            )
    for modality in ("audio", "vision", "features"):
        parts = {n: getattr(s, modality) for n, s in raw.splits.items()}
        dims = {n: p.ragged.dim for n, p in parts.items() if p is not None}
        if len(set(dims.values())) > 1:
            listed = ", ".join(f"{d} in {n}" for n, d in dims.items())
            found.append(
                DataError(
                    f"{where}, {modality}",
                    f"{listed} feature columns",
                    "the same number in every split",
                    "Extract all splits alike.",
                )
            )
    return found


def _pack(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [t.encode("utf-8", "replace") for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _tensors(data: StoreData) -> Iterator[tuple[str, np.ndarray]]:
    for name, split in data.splits.items():
        yield f"{name}/label", split.label
        packed = {"ids": _pack(split.ids)}
        if split.text is not None:
            packed["text"] = _pack(split.text)
        for key in ("audio", "vision", "tokens", "features"):
            ragged = getattr(split, key)
            if ragged is not None:
                packed[key] = (ragged.values, ragged.offsets)
        for key, (values, offsets) in packed.items():
            yield f"{name}/{key}/values", values
            yield f"{name}/{key}/offsets", offsets


def write_store(path: str | Path, data: StoreData) -> Path:
    """Write a store atomically; returns its file.

    Arrays go to the file one by one: the safetensors library's writer would copy them all into memory first.

    Raises:
        DataError: the folder cannot be written to, or there is no space.
    """
    path = store_path(path)
    tensors = {k: np.ascontiguousarray(v) for k, v in _tensors(data)}
    # widest types first, so that every tensor is aligned
    order = sorted(tensors, key=lambda k: -tensors[k].dtype.itemsize)
    meta = {
        **data.meta,
        "checksums": {k: hashlib.sha256(tensors[k].data if tensors[k].size else b"").hexdigest() for k in order},
    }
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(meta)}}
    at = 0
    for key in order:
        array = tensors[key]
        header[key] = {
            "dtype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for key in order:
                if tensors[key].size:
                    file.write(tensors[key].data)
    except OutputError as problem:
        raise DataError(
            problem.where, problem.found, problem.expected, "Free space or name another place for the store."
        ) from problem
    return path


class _Splits(Mapping):
    """The splits of an open store, each read when it is first asked for."""

    def __init__(self, path: Path, file: Any, names: list[str]):
        self._path, self._file, self._names = path, file, names
        self._keys = set(file.keys())
        self._read: dict[str, SplitData] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> SplitData:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            try:
                self._read[name] = self._load(name)
            except (SafetensorError, KeyError, ValueError) as cause:
                raise _damaged(self._path, cause) from None
        return self._read[name]

    def _ragged(self, key: str) -> Ragged | None:
        if f"{key}/values" not in self._keys:
            return None
        # torch tensors of the library are views of the mapped file, its numpy arrays are copies
        values, offsets = (self._file.get_tensor(f"{key}/{part}").numpy() for part in ("values", "offsets"))
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets of {key} do not fit its values")
        return Ragged(values, offsets)

    def _strings(self, key: str) -> list[str] | None:
        packed = self._ragged(key)
        if packed is None:
            return None
        raw = packed.values.tobytes()
        return [raw[a:b].decode("utf-8") for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]

    def _load(self, name: str) -> SplitData:
        label = self._file.get_tensor(f"{name}/label").numpy()
        parts = {k: self._ragged(f"{name}/{k}") for k in ("audio", "vision", "tokens", "features")}
        split = SplitData(self._strings(f"{name}/ids") or [], self._strings(f"{name}/text"), label, **parts)
        if any(len(p) != len(split) for p in (label, split.audio, split.vision)):
            raise ValueError(f"split {name} has parts of different lengths")
        return split


def _damaged(path: Path, cause: object) -> DataError:
    return DataError(
        str(path), f"a damaged store ({cause})", "a store made by `engine convert`", "Delete it and convert again."
    )


def open_store(path: str | Path) -> StoreData:
    """Open a store; its arrays are views of the mapped file.

    Raises:
        DataError: not a store, damaged, or of a later version.
    """
    path = store_path(path)
    try:
        file = safe_open(str(path), framework="pt")
        meta = json.loads((file.metadata() or {})[KEY])
        version, names = int(meta["version"]), list(meta["counts"])
    except KeyError:
        raise DataError(
            str(path),
            "a safetensors file of another kind",
            "a store made by `engine convert`",
            "Name the data's own file.",
        ) from None
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as cause:
        raise _damaged(path, cause) from None
    if version != VERSION:
        raise DataError(
            str(path),
            f"store version {version}",
            f"version {VERSION}",
            "Convert the data again with this version of engine.",
        )
    return StoreData(meta, _Splits(path, file, [s for s in SPLITS if s in names]))


def verify_store(path: str | Path) -> list[str]:
    """The tensors of a store whose checksum does not match; reads the whole file."""
    data = open_store(path)
    with safe_open(str(store_path(path)), framework="numpy") as file:
        sums = data.meta["checksums"]
        arrays = ((k, np.ascontiguousarray(file.get_tensor(k))) for k in file.keys())  # noqa: SIM118 (not a dict)
        return [k for k, a in arrays if hashlib.sha256(a.tobytes()).hexdigest() != sums.get(k)]


def cache_places(source: Source, settings: dict[str, Any]) -> list[Path]:
    """Where a store made on first use may lie: beside the source, else in the user's cache folder."""
    key = hashlib.sha256(json.dumps({**settings, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:8]
    first = next(iter(source.files.values())).absolute()
    stem = first.stem if "" in source.files else source.path.absolute().stem
    whole = hashlib.sha256(str(source.path.resolve()).encode()).hexdigest()[:8]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [
        first.parent / f"{stem}.engine-{key}.safetensors",
        base / "engine" / f"{stem}.{whole}.engine-{key}.safetensors",
    ]


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in `folder` (permission bits do not tell on network and read-only file systems)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
