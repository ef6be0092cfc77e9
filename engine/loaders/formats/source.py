"""The files that a path names, and what they hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from engine.config import MODALITIES
from engine.errors import DataError
from engine.files import user_path
from engine.loaders import safe_pickle
from engine.loaders.formats.checks import SPLIT_ALIASES, SPLITS, check_splits, listed, present
from engine.vocabulary import Alignment

MANIFEST = "manifest.csv"
SPLITS_FILE = "splits.json"
EDAIC_LABELS = "labels/train_split.csv"
CSD = (".csd", ".hdf5", ".h5")
PACKED = (".gz", ".tgz", ".zip", ".7z", ".rar", ".xz", ".bz2", ".tar", ".zst")
COMPANIONS = ("thumbs.db", "desktop.ini")  # file managers leave these in folders, and names that begin with a dot


@dataclass(frozen=True)
class Choice:
    """What to take if the data has several of a kind: the settings `data.*` of the same names.

    Attributes:
        audio_features, vision_features, text_features: name of a feature set; "auto" is the reader's first.
        label_column: of labels with several columns; None is sentiment, the first of the SDK's seven.
        align: .csd files: one row per word, or the frames of a segment as they are.
        label_key: set of labels of an MMSA file. auto: regression_labels. classes: classification_labels, if it has
            them.
        modalities: those of text, audio and vision that the data must hold.
        pool_audio, pool_vision: number of successive frames whose mean is one step.
        skip_columns: columns of a manifest's CSV files that are no features.
    """

    audio_features: str = "auto"
    vision_features: str = "auto"
    text_features: str = "auto"
    label_column: int | None = None
    align: Alignment = "words"
    label_key: str = "auto"
    modalities: tuple[str, ...] = MODALITIES
    pool_audio: int = 1
    pool_vision: int = 1
    skip_columns: tuple[str, ...] = ()

    def of(self, modality: Literal["audio", "vision", "text"], names: Iterable[str], where: str) -> str:
        """The name chosen for `modality` among `names`.

        Raises:
            DataError: it is not among them, or there are none.

        >>> Choice(audio_features="eb10").of("audio", ["COVAREP", "EB10"], "data")
        'EB10'
        """
        names, asked = list(names), getattr(self, f"{modality}_features")
        if not names:
            do = "Name a text encoder in text_encoder." if modality == "text" else "Add them."
            raise DataError(where, f"no {modality} features", "at least one set of them", do)
        if asked == "auto":
            return names[0]
        same = [n for n in names if n.lower() == asked.lower()]
        if not same:
            near = difflib.get_close_matches(asked, names, 1)
            raise DataError(
                where, f"no {modality} features {asked!r}", f"one of {', '.join(names)}",
                f"Set data.{modality}_features to {near[0] if near else 'one of them'}.",
            )  # fmt: skip
        return same[0]


@dataclass
class DataFiles:
    """What the user named: one file, or a folder with one file per split or per feature set (.csd).

    Attributes:
        path: as named.
        files: the file under "", the files by split name, or .csd files by their stems.
        choice: what to take if there is more than one of a kind.
        parts: further files of the data. A change of these is noticed too. Readers add those that they find themselves.
        notes: remarks for the user on what is skipped.
    """

    path: Path
    files: dict[str, Path]
    choice: Choice = Choice()
    parts: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def head(self) -> bytes:
        """The first 16 bytes of the (first) file. They identify every format that is not a pickle."""
        with next(iter(self.files.values())).open("rb") as file:
            return file.read(16)

    @cached_property
    def kind(self) -> Literal["pickle", "hdf5", "csv"]:
        """What the (first) file is, judged by its first bytes. A CSV has no mark and is recognised by its name."""
        if self.head.startswith(b"\x89HDF\r\n\x1a\n"):
            return "hdf5"
        return "csv" if next(iter(self.files.values())).suffix.lower() == ".csv" else "pickle"

    @cached_property
    def content(self) -> Any:
        """The unpickled object; for one file per split, a dict of them by split name.

        Raises:
            DataError: a file is not a pickle, is damaged, or is refused.
        """
        if "" in self.files:
            return safe_pickle.load(self.files[""])
        return {name: safe_pickle.load(file) for name, file in self.files.items()}

    def split_dict(self) -> dict[str, Any] | None:
        """The content by canonical split name, or None if it is not a dict of splits.

        The dicts are shallow copies. Keys that are byte strings become text.

        Raises:
            DataError: a split is there under two names.
        """
        if self.kind != "pickle":
            return None
        if isinstance(self.content, dict):
            splits: dict[str, Any] = {}
            for key, split in _text_keys(self.content).items():
                name = SPLIT_ALIASES.get(key, key)
                if name in splits:
                    raise DataError(
                        str(self.path), f"the split {name} under two names, one of them {key!r}", f"one {name} split",
                        "Remove one of them.",
                    )  # fmt: skip
                splits[name] = _text_keys(split) if isinstance(split, dict) else split
            if set(splits) & set(SPLITS):
                return splits
        alone = _split_named(self.files[""]) if "" in self.files else None
        if alone is None:
            return None
        return {alone: _text_keys(self.content) if isinstance(self.content, dict) else self.content}


def _text_keys(content: dict) -> dict[str, Any]:
    """A copy of a dict, with text for keys."""
    return {safe_pickle.decoded(k) if isinstance(k, bytes) else str(k): v for k, v in content.items()}


def find_source(path: str | Path, choice: Choice | None = None) -> DataFiles:
    """The file or files that `path` names.

    A folder may hold one pickle, one file per split (train, dev or valid, test, with a common prefix), .csd files, or a
    manifest.csv. A path to one such split file or .csd file stands for all of them. Hidden files and what file managers
    leave in folders are skipped; the source's `notes` say so.

    Raises:
        DataError: there is nothing, or more than one candidate.
    """
    path = user_path(path)
    source = _find(path, choice or Choice())
    if path.is_dir() or "" not in source.files:
        folder = path if path.is_dir() else path.parent
        hidden = sorted(p.name for p in folder.iterdir() if is_hidden(p) and p.is_file() and p.suffix != ".part")
        source.notes += [f"skipped files: {listed(hidden)}"] if hidden else []
    return source


def _find(path: Path, choice: Choice) -> DataFiles:
    if not path.exists():
        near = (
            []
            if not path.parent.is_dir()
            else difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
        )
        raise DataError(
            str(path), "nothing", "a file or folder of features",
            f"Did you mean {near[0]}?" if near else "Check the path.",
        )  # fmt: skip
    if not path.is_file() and not path.is_dir():
        raise DataError(str(path), "neither a file nor a folder", "a file or folder of features", "Check the path.")
    folder = path if path.is_dir() else path.parent
    groups = _split_groups(folder)
    if path.is_file():
        if path.suffix.lower() in CSD:
            return DataFiles(path, _csd(folder), choice, _splits_file(folder))
        if path.suffix.lower() == ".csv":
            return DataFiles(path, {"": path}, choice, _below(folder))
        for files in groups.values():
            if path in files.values():
                return _one_per_split(path, files, choice)
        return DataFiles(path, {"": path}, choice)
    single = [p for p in _pickles(folder) if not any(p in files.values() for files in groups.values())]
    manifest, csd = folder / MANIFEST, _csd(folder)
    if len(single) + len(groups) + bool(csd) + manifest.is_file() != 1:
        names = [p.name for p in single] + [f"{prefix}{{{','.join(files)}}}.pkl" for prefix, files in groups.items()]
        names += [MANIFEST] * manifest.is_file() + ["*.csd"] * bool(csd)
        tables = [p.name for p in csv_files(folder) if not names]
        if (path / EDAIC_LABELS).is_file():
            raise DataError(
                str(path), f"the interviews of E-DAIC (AVEC2019), with {EDAIC_LABELS}", "one data set",
                "Write a manifest.csv that names their feature files: docs/formats.md, section AVEC2019.",
            )  # fmt: skip
        packed = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in PACKED and not is_hidden(p)]
        if packed and not names:
            raise DataError(str(path), f"packed files ({listed(packed)})", "one data set", "Unpack them first.")
        if tables:
            raise DataError(
                str(path), f"no manifest.csv, but {listed(tables)}", "one data set",
                "Write all samples into one manifest.csv with the columns id, split, label and modalities, or name the "
                "file that is it.",
            )  # fmt: skip
        if names:
            found = f"{len(names)} candidates ({', '.join(sorted(names)[:6])})"
            raise DataError(str(path), found, "one data set", "Name the file that is meant.")
        there = sorted(p.name for p in path.iterdir() if not is_hidden(p))
        found = f"no pickle, .csd or manifest.csv{', but ' if there else ''}{listed(there)}"
        do = "Name the file or the folder that holds the features."
        raise DataError(str(path), found, "one data set", do)
    if single:
        return DataFiles(path, {"": single[0]}, choice)
    if csd:
        return DataFiles(path, csd, choice, _splits_file(folder))
    if groups:
        return _one_per_split(path, next(iter(groups.values())), choice)
    return DataFiles(path, {"": manifest}, choice, _below(folder))


def is_hidden(path: Path) -> bool:
    """Whether a file is a companion that no user means, such as `.DS_Store`, `._x.pkl`, `Thumbs.db`.

    >>> is_hidden(Path("data/._x.pkl"))
    True
    """
    return path.name.startswith(".") or path.name.lower() in COMPANIONS


def _pickles(folder: Path) -> list[Path]:
    kinds = (".pkl", ".pickle", ".p")
    return sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file() and not is_hidden(p))


def _csd(folder: Path) -> dict[str, Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in CSD and p.is_file() and not is_hidden(p))
    return {p.stem: p for p in files}


def csv_files(folder: Path) -> list[Path]:
    """The CSV files of a folder, without hidden ones."""
    return sorted(p for p in folder.glob("*.csv") if not is_hidden(p) and p.is_file())


def _splits_file(folder: Path) -> list[Path]:
    return [p for p in [folder / SPLITS_FILE] if p.is_file()]


def _below(folder: Path) -> list[Path]:
    kinds = (".npy", ".csv")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file() and not is_hidden(p))


_NAMED = re.compile(r"(|.*[^a-zA-Z])(train|valid|val|dev|test)")


def _split_named(file: Path) -> str | None:
    """The split after which a file is named."""
    named = _NAMED.fullmatch(file.stem)
    return SPLIT_ALIASES[named[2]] if named else None


def _split_groups(folder: Path) -> dict[str, dict[str, Path]]:
    """Files that are named after splits, by their common prefix. A single file is no group."""
    groups: dict[str, dict[str, Path]] = {}
    for file in _pickles(folder):
        named = _NAMED.fullmatch(file.stem)
        if named:
            groups.setdefault(named[1], {})[named[2]] = file
    return {prefix: files for prefix, files in groups.items() if len(files) > 1}


def _one_per_split(path: Path, files: Mapping[str, Path], choice: Choice) -> DataFiles:
    by_split: dict[str, Path] = {}
    for name, file in files.items():
        split = SPLIT_ALIASES[name]
        if split in by_split:
            raise DataError(
                str(path), f"both {by_split[split].name} and {file.name}", f"one {split} file", "Move one of them away."
            )
        by_split[split] = file
    check_splits(str(path), by_split)
    return DataFiles(path, {s: by_split[s] for s in present(by_split)}, choice)
