"""What is fuzzed: one target a reader. Any exception but an `EngineError`, and any result that does not hold together,
is a finding.

Two kinds of input reach the pickle readers. One that begins as a pickle does is a file: it goes through the unpickler.
Any other is a list of edits of well-formed content (`edited`), which bypasses the unpickler and so reaches the readers'
checks far more often.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.errors import EngineError
from engine.loaders import formats, safe_pickle
from engine.loaders.convert import prepare
from engine.loaders.dataset import Dataset
from engine.loaders.formats import SPLITS, Choice, DataFiles, RawDataset, csd
from engine.loaders.hdf5 import CsdReader
from engine.loaders.make_data import writers
from engine.loaders.make_data.writers import Caps, Sample
from engine.loaders.problems import problems
from engine.loaders.store import open_store, verify_store, write_store
from tests.loaders.writers import sdk

RULES = ("recorded", "all_zero", "sum_zero")
CAPS = Caps(3, 4, 4)
MEMORY = Path("/dev/shm")
PICKLES = ("declarelab", "mmsa", "tuples", "magbert", "sdk", "avec2019")


@dataclass
class Target:
    """A reader to fuzz: well-formed inputs to start from, and what is done with an input."""

    name: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]


class Finding(Exception):
    """A reader returned something that does not hold together."""


def execute(target: Target, data: bytes) -> str | None:
    """Run one input; None, or the finding: where the exception came from."""
    try:
        target.run(data)
    except EngineError as problem:
        if "\n" in str(problem):
            return "an error of more than one line"
    except Exception as cause:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if "engine" in f.filename] or [None]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames[-1] else "?"
        return f"{type(cause).__name__} at {place}: {str(cause)[:200]}"
    return None


_kept: list[tempfile.TemporaryDirectory] = []


@cache
def folder() -> Path:
    """Where inputs become files; in memory where the system has such a place."""
    _kept.append(tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
    return Path(_kept[0].name)


def clean() -> None:
    """Remove that folder."""
    _kept[0].cleanup()


def small(seed: int = 0) -> dict[str, list[Sample]]:
    """Four samples of two columns."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Sample]] = {}
    for split, size in zip(SPLITS, (2, 1, 1), strict=True):
        out[split] = []
        for i in range(size):
            steps = int(rng.integers(1, 4))
            more = {k: rng.normal(size=(steps, 2)).astype("f") for k in ("ege", "ds", "resnet")}
            frames = [rng.normal(size=(steps, 2)).astype("f") for _ in range(2)]
            text = "\n".join(["so good"] * steps)
            out[split].append(Sample(f"{split}_{i}", text, round(float(rng.uniform()), 1), *frames, more))
    return out


def contents(name: str) -> list[Any]:
    """Well-formed contents of the pickle formats."""
    data = small()
    match name:
        case "declarelab":
            return [writers.declarelab(data, ids, dtype, CAPS, 2) for ids, dtype in (("mosi", "f4"), ("mosei", "f8"))]
        case "mmsa":
            full = writers.mmsa(data, True, True, 2, caps=CAPS)
            return [full, writers.mmsa(data, False, caps=CAPS), writers.mmsa_fet(data)]
        case "tuples":
            return [writers.tuples(data, 6), writers.tuples(data, 4)]
        case "magbert":
            return [writers.magbert(data)]
        case "sdk":
            return [sdk(writers.aligned(data), sets) for sets in ("mosi", "mosei", "pom")]
        case "avec2019":
            return [writers.avec2019(data)]
    raise KeyError(name)


# -- edits of well-formed content --


def oddities() -> list[Any]:
    """What a value is replaced by."""
    return [
        None, "", "x" * 50, b"", b"\xff\xfe", "\ud800", -1, 0, 1, 2**63, -(2**63), 1e308, float("nan"), float("inf"),
        True,
        [], {}, (), [[]], [[1], [1, 2]], {"train": 1}, [None], ["a"], [b"a", 1], ("a", 1.5), {1}, bytearray(b"ab"),
        np.zeros(0), np.zeros((0, 3)), np.zeros((2, 0, 3)), np.zeros((2, 3, 0)), np.ones(1), np.ones((2, 2)),
        np.ones((2, 3, 2)), np.ones((2, 1, 7)), np.ones((2, 18)), np.ones((1, 1, 1, 1)), np.array(1.0), np.array("a"),
        np.array(["a", "b"]), np.array([b"a_1", b"b_2"]), np.array([["a", "1", "2"], ["b", "1", "2"]]),
        np.array([None, 1], object), np.array([[1, 2], [3, 4]], object), np.ones((2, 2), bool),
        np.ones((2, 2), complex),
        np.full((2, 2), np.nan), np.full((2, 3, 2), np.inf), np.full((2, 3), -(2**63)),
        np.full((2, 3, 2), 2**63, np.uint64), np.float32(2), np.str_("a"), np.int64(5),
        np.full((2, 3, 2), 1e300), np.full(2, 1e300), np.ones((2, 2), np.float16), np.ones((3, 2, 2)).T,
    ]  # fmt: skip


def edited(content: Any, edits: Iterator[int]) -> Any:
    """`content` after up to eight edits, each told by a few bytes of `edits`."""
    content = copy.deepcopy(content)
    for _ in range(8):
        try:
            content = _edit(content, edits)
        except StopIteration:
            break
    return content


def _edit(content: Any, edits: Iterator[int]) -> Any:
    children = _children(content)
    where = next(edits)
    if children and where % 8:  # deeper
        key = children[where // 8 % len(children)]
        return _put(content, key, _edit(_get(content, key), edits))
    how, which = next(edits), next(edits)
    if how % 8 == 0 and children:  # without one of its children
        return _without(content, children[which % len(children)])
    if how % 8 == 1 and isinstance(content, dict) and children:  # a key misnamed
        key = children[which % len(children)]
        return {(str(k)[:-1] if k == key else k): v for k, v in content.items()}
    if how % 8 == 2 and isinstance(content, (list, tuple)) and len(content):  # one row more
        return type(content)([*content, content[which % len(content)]])
    if how % 8 == 3 and isinstance(content, dict) and len(children) > 1:  # two values exchanged
        a, b = children[which % len(children)], children[which // 16 % len(children)]
        return {**content, a: content[b], b: content[a]}
    if how % 8 == 4 and isinstance(content, np.ndarray):
        changes: list[Callable[[], Any]] = [
            lambda: content[:-1], lambda: content[..., :1], lambda: content.T, lambda: content.reshape(-1),
            lambda: content[None], lambda: content.astype("f8") * np.inf, lambda: content.astype(object),
            lambda: content.astype("U3"), lambda: content.tolist(), lambda: np.concatenate([content] * 3),
            lambda: content * 0, lambda: content.astype("i8"), lambda: content[..., None], lambda: content[:0],
        ]  # fmt: skip
        try:
            with np.errstate(all="ignore"):
                return changes[which % len(changes)]()
        except (ValueError, TypeError, IndexError):
            return content
    odd = oddities()
    return odd[which % len(odd)]


def _children(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if isinstance(content, (list, tuple)) else []


def _get(content: Any, key: Any) -> Any:
    return content[key]


def _put(content: Any, key: Any, value: Any) -> Any:
    if isinstance(content, dict):
        return {**content, key: value}
    return type(content)([*content[:key], value, *content[key + 1 :]])


def _without(content: Any, key: Any) -> Any:
    if isinstance(content, dict):
        return {k: v for k, v in content.items() if k != key}
    return type(content)([*content[:key], *content[key + 1 :]])


# -- the readers --


def check(raw: RawDataset, where: str) -> None:
    """Whatever a reader returns is finite and of one length, and its splits are known and in order."""
    if not raw.splits or list(raw.splits) != [s for s in SPLITS if s in raw.splits]:
        raise Finding(f"splits {list(raw.splits)}")
    for split in raw.splits.values():
        count = len(split.ids)
        if not count or not all(isinstance(i, str) for i in split.ids):
            raise Finding("ids")
        if split.text is not None and (len(split.text) != count or not all(isinstance(t, str) for t in split.text)):
            raise Finding("texts")
        if split.label.shape != (count, 1) or split.label.dtype != np.float32 or np.isinf(split.label).any():
            raise Finding("labels")
        for part in (split.audio, split.vision, split.features):
            if part is None:
                continue
            values, offsets = part.ragged.values, part.ragged.offsets
            if len(offsets) != count + 1 or offsets[-1] != len(values) or (np.diff(offsets) < 1).any():
                raise Finding("offsets")
            if values.dtype != np.float32 or values.ndim != 2 or not np.isfinite(values).all():
                raise Finding("values")
        "\n".join(split.ids).encode(), "\n".join(split.text or []).encode()
    problems(raw, where)


def _settings(byte: int) -> tuple[str, bool, Choice]:
    return RULES[byte % 3], byte // 3 % 4 == 1, Choice(label_column=[None, None, None, 2][byte // 12 % 4])


def _pickle_reader(name: str) -> Target:
    path = folder() / f"{name}.pkl"
    reader = next(f for f in formats.formats() if f.name == name)

    def seeds() -> list[bytes]:
        made = contents(name)
        files = [pickle.dumps(c, protocol) for c in made for protocol in (2, 4)]
        edits = [bytes([i, 13 * i % 256, 8 * j, 9, i, 7 * i % 256, 4, j]) for i in range(48) for j in (1, 5)]
        return files + edits

    bases = contents(name)

    def run(data: bytes) -> None:
        setting = data[-1] if data else 0
        rule, features, choice = _settings(setting)
        source = DataFiles(path, {"": path}, choice)
        if data[:1] == b"\x80":
            path.write_bytes(data)
        else:
            edits = iter(data)
            content = edited(bases[next(edits, 0) % len(bases)], edits)
            source.__dict__.update(content=content, kind="pickle")
        if name == "declarelab" and not (path.parent / "label.csv").exists():
            writers.write_csv(path.parent / "label.csv", writers.label_rows(small()))
        if reader.recognises(source):
            check(reader.read(source, rule, features), str(path))
        else:
            formats.describe(source)

    return Target(name, seeds, run)


def _unpickler() -> Target:
    def seeds() -> list[bytes]:
        plain = {"a": [1, 2.5, None, True, "x", b"y", (1, (2, 3)), {1, 2}, frozenset({3}), bytearray(b"z"), 2**40, -1]}
        arrays = [
            np.arange(6, dtype="f4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(["a", "\xe4"]),
            np.array([b"a"]), np.array([None, [1]], object), np.float32(1.5), np.str_("word"),
            np.arange(2, dtype=">i4"),
        ]  # fmt: skip
        return [pickle.dumps(c, p) for c in (plain, arrays) for p in range(6)]

    path = folder() / "any.pkl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        safe_pickle.load(path)

    return Target("pickle", seeds, run)


def _label_csv() -> Target:
    place = folder() / "labels"
    place.mkdir(exist_ok=True)
    data = small()
    pickles = [place / f"{ids}.pkl" for ids in ("mosi", "mosei")]
    for path in pickles:
        writers.dump(writers.declarelab(data, path.stem, caps=CAPS, glove=2), path)
    reader = next(f for f in formats.formats() if f.name == "declarelab")
    table = place / "label.csv"

    def seeds() -> list[bytes]:
        rows = writers.label_rows(data)
        starts = [{**r, "clip_id": f"{float(r['clip_id']) * 1.5:g}"} for r in rows]
        out = []
        for variant in (rows, starts):
            writers.write_csv(table, variant)
            out.append(table.read_bytes())
        return [*out, out[0].replace(b",", b";"), b"\xef\xbb\xbf" + out[0]]

    loaded = [safe_pickle.load(path) for path in pickles]

    def run(data: bytes) -> None:
        table.write_bytes(data)
        path = pickles[len(data) % 2]
        source = DataFiles(path, {"": path})
        content = {split: dict(parts) for split, parts in loaded[len(data) % 2].items()}  # readers take it apart
        source.__dict__.update(content=content, kind="pickle")
        check(reader.read(source, "recorded", False), str(path))

    return Target("label_csv", seeds, run)


def _manifest(part: str) -> Target:
    """part: manifest (the table itself), npy or frames (the files it names)."""
    place = writers.write_manifest(folder() / part, small(), "csv" if part == "frames" else "npy", features=2)
    reader = next(f for f in formats.formats() if f.name == "manifest")
    target = {
        "manifest": place / "manifest.csv",
        "npy": place / "audio" / "train_0.npy",
        "frames": place / "audio" / "train_0.csv",
    }[part]

    def seeds() -> list[bytes]:
        if part != "npy":
            return [target.read_bytes(), target.read_bytes().replace(b"\n", b"\r\n")]
        out = []
        whole = np.ones((3, 2))
        for array in (whole.astype("f4"), whole.astype(">f8"), np.asfortranarray(whole), whole[:0]):
            np.save(target, array)
            out.append(target.read_bytes())
        return out

    def run(data: bytes) -> None:
        target.write_bytes(data)
        source = DataFiles(place / "manifest.csv", {"": place / "manifest.csv"})
        if reader.recognises(source):
            check(reader.read(source, "recorded", bool(data) and data[-1] % 2 == 1), str(place))

    return Target(part, seeds, run)


class _Shared(CsdReader):
    """One child process for all executions: starting one takes longer than a hundred of them."""

    reader: CsdReader | None = None

    def __enter__(self) -> CsdReader:
        if _Shared.reader is None:
            _Shared.reader = CsdReader(patience=20)
        return _Shared.reader

    def __exit__(self, *_: Any) -> None:
        pass


def _csd() -> Target:
    place = folder() / "csd"
    names = ("words", "COVAREP", "labels")
    whole: dict[str, bytes] = {}
    reader = next(f for f in formats.formats() if f.name == "csd")

    def prepare() -> None:
        if not whole:
            writers.write_csd(place, small(), labels=7)
            whole.update({n: (place / f"{n}.csd").read_bytes() for n in names})

    def seeds() -> list[bytes]:
        prepare()
        return [bytes([i]) + whole[name] for i, name in enumerate(names)]

    def run(data: bytes) -> None:
        prepare()
        csd.CsdReader = _Shared
        name = names[(data[0] if data else 0) % len(names)]
        (place / f"{name}.csd").write_bytes(data[1:])
        try:
            files = {p.stem: p for p in sorted(place.glob("*.csd"))}
            align = "segments" if data and data[0] > 127 else "words"
            source = DataFiles(place, files, Choice(align=align))
            if reader.recognises(source):
                check(reader.read(source, "recorded", False), str(place))
        finally:
            (place / f"{name}.csd").write_bytes(whole[name])

    return Target("csd", seeds, run)


def _store() -> Target:
    place = folder() / "store"
    path = place / "x.safetensors"

    def seeds() -> list[bytes]:
        out = []
        for name in ("mmsa", "avec2019"):
            source = DataFiles(writers.dump(contents(name)[0], place / f"{name}.pkl"), {"": place / f"{name}.pkl"})
            reader = next(f for f in formats.formats() if f.name == name)
            raw = reader.read(source, "recorded", name == "mmsa")
            out.append(write_store(path, prepare(source, raw, "recorded", None, "mark")).read_bytes())
        return out

    def run(data: bytes) -> None:
        place.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # another file: the one before may still be mapped
        path.write_bytes(data)
        opened = open_store(path)
        for split in opened.splits.values():
            count = len(split.ids)
            parts = [split.label, split.audio, split.vision, *(p for p in (split.tokens, split.features) if p)]
            if any(len(part) != count for part in parts) or (split.text is not None and len(split.text) != count):
                raise Finding("parts of different lengths")
            for part in parts[1:]:
                for i in range(count):
                    part[i].sum()
        if opened.splits:
            verify_store(path)
            Dataset(opened, DataConfig(), None, None)

    return Target("store", seeds, run)


TARGETS: dict[str, Callable[[], Target]] = {
    "pickle": _unpickler,
    **{name: partial(_pickle_reader, name) for name in PICKLES},
    "label_csv": _label_csv,
    **{part: partial(_manifest, part) for part in ("manifest", "npy", "frames")},
    "csd": _csd,
    "store": _store,
}  # fmt: skip
"""Reader -> function that makes its target."""
