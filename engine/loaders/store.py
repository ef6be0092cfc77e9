"""One ragged, memory-mapped store for every format: a safetensors file.

Tensors, for each split S:

- `S/label` float32 [N, 1], NaN where a sample has none;
- `S/audio/values` float32 (or float16) [total, d] and `S/audio/offsets` int64 [N + 1]; the same for vision;
- `S/tokens/values` int32 [total] and offsets: special tokens included, not cut;
- `S/ids/values` and `S/text/values` uint8 (UTF-8) and offsets;
- `S/features/values` float32 (or float16) [total, d_t] and offsets, only where precomputed text features were asked
  for.

The metadata entry `engine_store` is a JSON object: version, source format and fingerprint, length rule, tokeniser, what
was cleaned, and a sha256 of every tensor; `engine convert` adds the sha256 of every source file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from engine import __version__
from engine.config import MODALITIES
from engine.errors import DataError, OutputError
from engine.files import atomic_file, cache_home, parse_json, user_path
from engine.loaders.formats import SPLITS, RawDataset, RawSplit, Source, missing_split, remarks
from engine.loaders.ragged import LengthRule, Ragged, absent, release, zero_frames
from engine.loaders.text import Tokenizer

VERSION = 2  # 1: padding was taken to be where the format has it, whatever the zeros said
KEY = "engine_store"
FILE = "store.safetensors"
HEAD_BYTES = 1 << 20
HEADER_BYTES = 1 << 26  # of a store: it holds a checksum a source file

NAN_WORDS = ("nan", "none", "null", "<na>", "n/a")
CHUNK = 1 << 24  # bytes that are written or summed at a time

_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_NUMPY = {name: np.dtype(kind) for kind, name in _TYPES.items()}


def _unchanged() -> None:
    """Arrays in memory do not change."""


@dataclass
class SplitData:
    """One split, not normalised, possibly memory-mapped.

    Attributes:
        ids, text: N names; N transcripts or None.
        label: float32 [N, 1]; NaN where a sample has none.
        audio, vision: float32 ragged [total, d]; a missing modality is one zero frame.
        tokens: int32 ragged or None. features: float32 ragged [total, d_t] or None.
        check: raises DataError where the arrays are views of a file that has changed since it was opened; asked
            before they are read.
        origin: the store's path and the split's name, where they are.
        modalities: what is left after `only`.
    """

    ids: list[str]
    text: list[str] | None
    label: np.ndarray
    audio: Ragged
    vision: Ragged
    tokens: Ragged | None = None
    features: Ragged | None = None
    check: Callable[[], None] = _unchanged
    origin: tuple[str, str] | None = None
    modalities: tuple[str, ...] = MODALITIES

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store itself; tokens are sent, since they may be another tokeniser's."""
        if self.origin is not None:
            tokens = self.tokens and Ragged(np.array(self.tokens.values), np.array(self.tokens.offsets))
            dims = {m: getattr(self, m).dim for m in ("audio", "vision")}
            return _reopen, (*self.origin, tokens, self.modalities, dims)
        return SplitData, tuple(getattr(self, f.name) for f in fields(self))

    def widened(self, dims: Mapping[str, int]) -> SplitData:
        """This split with another width of the modalities in `dims`, which no sample of it has."""
        wide = {m: zero_frames(len(self), dim) for m, dim in dims.items() if getattr(self, m).dim != dim}
        return replace(self, **wide) if wide else self

    def only(self, modalities: Sequence[str]) -> SplitData:
        """The same samples without the other modalities: one frame, of one zero, in their place."""
        gone = [m for m in MODALITIES if m not in modalities]
        changes: dict[str, Any] = {m: absent(len(self)).ragged for m in gone if m != "text"}
        if "text" in gone:
            changes |= {"text": None, "tokens": None, "features": absent(len(self)).ragged}
        return replace(self, **changes, modalities=tuple(modalities)) if gone else self


def _reopen(
    path: str, name: str, tokens: Ragged | None, modalities: tuple[str, ...], dims: dict[str, int]
) -> SplitData:
    return replace(open_store(path).splits[name], tokens=tokens).only(modalities).widened(dims)


@dataclass
class StoreData:
    """Splits and what is known of them (see the module's text for `meta`)."""

    meta: dict[str, Any]
    splits: Mapping[str, SplitData]

    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's ids, texts, labels and features, whatever file or folder they came from.

        Tokens count only where there are no texts that they follow from.
        """
        sums = self.meta.get("checksums")
        if not sums:  # not read from a store
            sums = {key: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for key, array in _tensors(self)}
        found = {}
        for name, split in self.splits.items():
            own = {key: value for key, value in sums.items() if key.startswith(f"{name}/")}
            if split.text is not None:
                own = {key: value for key, value in own.items() if not key.startswith(f"{name}/tokens/")}
            found[name] = hashlib.sha256(json.dumps(sorted(own.items())).encode()).hexdigest()
        return found


def store_path(path: str | Path) -> Path:
    """The store's file where `path` names a store or its folder, or would after writing."""
    path = user_path(path)
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


def source_sums(source: Source, beside: list[Path]) -> dict[str, str]:
    """sha256 of every file that data was read from, by name: to compare with what its publisher says."""
    sums = {}
    for path in [*source.files.values(), *source.parts, *beside]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        sums[path.name] = digest.hexdigest()
    return sums


def prepare(
    source: Source,
    raw: RawDataset,
    rule: LengthRule,
    tokenizer: Tokenizer | None,
    mark: str,
    training: bool = True,
) -> StoreData:
    """Check what a reader returned and make it store content. `mark` is the source's fingerprint.

    Args:
        training: whether the data has to be fit for training, or only for prediction.

    Raises:
        DataError: see `problems`.
    """
    level_widths(raw)
    found = problems(raw, str(source.path), source.choice.modalities, training)
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
            "dropped": {"audio": split.audio.dropped, "vision": split.vision.dropped},
            "missing": {
                "audio": len(split.audio.missing),
                "vision": len(split.vision.missing),
                "text": sum(not t.strip() for t in text) if text is not None else 0,
                "features": len(split.features.missing) if split.features else 0,
            },
        }
    meta = {
        "version": VERSION,
        "engine": __version__,
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
        "notes": remarks(source, raw) + nan_words(raw),
    }
    return StoreData(meta, splits)


def level_widths(raw: RawDataset) -> None:
    """Give a split that lacks a modality in every sample the width that it has in the others."""
    for modality in ("audio", "vision", "features"):
        parts = {n: p for n, s in raw.splits.items() if (p := getattr(s, modality)) is not None}
        present = [p.ragged.dim for p in parts.values() if len(p.missing) < len(p.ragged)]
        for name, part in parts.items():
            if present and len(part.missing) == len(part.ragged) and part.ragged.dim != present[0]:
                setattr(raw.splits[name], modality, absent(len(part.ragged), present[0]))


def nan_words(raw: RawDataset) -> list[str]:
    """A note on texts that are the word which an empty cell often becomes, if there are any."""
    counts = {n: sum(t.strip().lower() in NAN_WORDS for t in s.text or []) for n, s in raw.splits.items()}
    counts = {n: count for n, count in counts.items() if count}
    if not counts:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"{sum(counts.values())} texts are a word such as nan or None, kept as they are: empty those cells if "
            f"nothing was said ({listed})"]  # fmt: skip


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


def training_problems(splits: Mapping[str, SplitData | RawSplit], where: str) -> list[DataError]:
    """What keeps samples that can be predicted from being trained on: splits or labels that are missing.

    The test split may have no label at all: it is held back.
    """
    if len(splits) < len(SPLITS):
        return [missing_split(where, list(splits))]
    found = []
    for name, split in splits.items():
        gone = np.flatnonzero(np.isnan(split.label[:, 0]))
        if len(gone) and not (name == "test" and held_back(split)):
            row = int(gone[0])
            found.append(
                DataError(
                    f"{where}, {name}, labels, row {row} (id {split.ids[row]})",
                    f"label nan ({len(gone)} of {len(split.ids)} samples have none)",
                    "a finite number" + (", or no label in the whole split" if name == "test" else ""),
                    "Mend or remove the row.",
                )
            )
    return found


def held_back(split: SplitData | RawSplit) -> bool:
    """Whether no sample of a split has a label."""
    return bool(np.isnan(split.label).all())


def problems(
    raw: RawDataset, where: str, modalities: Sequence[str] = MODALITIES, training: bool = True
) -> list[DataError]:
    """What keeps a data set from being used: duplicate ids, widths that differ between splits, and in training no texts
    in a split, splits or labels that are missing."""
    found = training_problems(raw.splits, where) if training else []
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
        if _has_nothing(split):
            found.append(
                DataError(
                    f"{where}, {name}", "no text, audio or vision in any sample", "one of them at least",
                    "Check the feature extraction.",
                )
            )  # fmt: skip
    found += _no_text(raw, where) if training else []
    for modality in [m for m in ("audio", "vision") if m in modalities] + ["features"]:
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


def _silent(split: RawSplit) -> bool:
    return split.text is None or not any(t.strip() for t in split.text)


def _has_nothing(split: RawSplit) -> bool:
    parts = [p for p in (split.audio, split.vision, split.features) if p is not None]
    return _silent(split) and all(len(p.missing) == len(split.ids) for p in parts)


def _no_text(raw: RawDataset, where: str) -> list[DataError]:
    """A data set without a single text; one split may lack them, as it may lack audio or vision."""
    splits = raw.splits.values()
    if all(s.features is not None and len(s.features.missing) == len(s.ids) for s in splits):
        expected = "precomputed text features, as text_encoder=features says"
        return [DataError(f"{where}, text", "zeros in all text features", expected, "Name a text encoder.")]
    if all(s.text is not None and _silent(s) for s in splits):
        do = "Give a file with transcripts, or text_encoder=features."
        return [DataError(where, "no text in any sample", "transcripts", do)]
    return []


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


def write_store(path: str | Path, data: StoreData, dtype: Literal["float32", "float16"] | None = None) -> Path:
    """Write a store atomically; returns its file.

    Arrays go to the file piece by piece: the safetensors library's writer would copy them all into memory first.

    Args:
        dtype: of frames and text features; None keeps it.

    Raises:
        DataError: the folder cannot be written to, there is no space, values that float16 cannot hold, or the store
            that the data comes from has changed.
    """
    path = store_path(path)
    tensors = {}
    for key, array in _tensors(data):
        kind = array.dtype if dtype is None or array.dtype.kind != "f" or key.endswith("/label") else np.dtype(dtype)
        tensors[key] = array, kind
    # widest types first, so that every tensor is aligned
    order = sorted(tensors, key=lambda k: -tensors[k][1].itemsize)
    sums = dict.fromkeys(order, "0" * 64)  # known when all is written: the header gets room for them
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
    """A store could not be written: what to do."""
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
    """The bytes of an array as `kind`, piece by piece; memory of mapped files is given back."""
    rows = max(1, CHUNK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(part, kind)
        if kind == np.float16 != array.dtype and not np.isfinite(found).all():
            raise DataError(
                where, "values beyond ±65504, the range of float16", "values in its range", "Convert to fp32 instead."
            )
        if found.size:
            yield found.reshape(-1).view(np.uint8).data
        release(part)


class _File:
    """A mapped safetensors file of a store.

    A mapping ends where its file was cut off, and reading past that end kills the process: `check` asks the system
    whether the file is still the one that was opened. A file that another one has taken the place of stays readable.
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
        """Raise DataError unless the file is as it was opened."""
        now = self._stat()
        if now != self._state:
            found = f"{now[0]} bytes" if now[0] != self._state[0] else "a later time of writing"
            raise DataError(
                str(self.path),
                f"a store that was written to while in use ({found})",
                f"the file as it was opened ({self._state[0]} bytes)",
                "Run `engine inspect --verify` on it, or convert the data again, and start again.",
            )

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        return list(self._entries)

    def tensor(self, key: str) -> np.ndarray:
        """A read-only view of a tensor.

        Raises:
            KeyError: there is none. ValueError: of a type that a store does not have.
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
    """The splits of an open store, each read when it is first asked for."""

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
        offsets = np.array(offsets)  # only frames stay in the file: they alone are large, and read under `check`
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
            check=self._file.check, origin=(str(self._file.path), name),
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


def _damaged(path: Path, cause: object) -> DataError:
    return DataError(
        str(path), f"a damaged store ({cause})", "a store made by `engine convert`", "Delete it and convert again."
    )


def open_store(path: str | Path) -> StoreData:
    """Open a store; its arrays are views of the mapped file.

    Raises:
        DataError: not a store, damaged, or of a later version.
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
            str(path),
            "a safetensors file of another kind",
            "a store made by `engine convert`",
            "Name the data's own file.",
        ) from None
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
    """Whether a store's description holds what is read from it, in the types in which it was written."""
    counts = meta["counts"]
    return (
        all(isinstance(meta.get(key), str) for key in ("format", "source", "fingerprint", "length_rule"))
        and isinstance(meta.get("notes"), list)
        and isinstance(meta.get("checksums"), dict)
        and isinstance(meta.get("tokenizer", 0), (dict, type(None)))
        and isinstance(counts, dict)
        and bool(counts)
        and set(counts) <= set(SPLITS)
        and all(
            isinstance(split.get(kind), dict) and all(isinstance(n, int) for n in split[kind].values())
            for split in counts.values()
            for kind in ("nonfinite", "missing", "dropped")
        )
    )


def verify_store(path: str | Path) -> list[str]:
    """The tensors of a store whose checksum does not match; reads the whole file, without holding it in memory.

    Raises:
        DataError: not a store, damaged, or written to meanwhile.
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


def cache_places(source: Source, settings: dict[str, Any]) -> list[Path]:
    """Where a store made on first use may lie: beside the source, else in the user's cache folder, if there is one."""
    key = hashlib.sha256(json.dumps({**settings, "version": VERSION}, sort_keys=True).encode()).hexdigest()[:8]
    first = next(iter(source.files.values())).absolute()
    stem = first.stem if "" in source.files else source.path.absolute().stem
    whole = hashlib.sha256(str(source.path.resolve()).encode()).hexdigest()[:8]
    places, cache = [first.parent / f"{stem}.engine-{key}.safetensors"], cache_home()
    if cache is not None:
        places.append(cache / "engine" / f"{stem}.{whole}.engine-{key}.safetensors")
    return places


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in `folder` (permission bits do not tell on network and read-only file systems)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
