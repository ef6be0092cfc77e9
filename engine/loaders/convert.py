"""From foreign files to the content of a store; and `engine convert`, which writes that store."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engine import __version__
from engine.errors import DataError, OutputError
from engine.files import parse_json, sweep, user_path
from engine.loaders import formats
from engine.loaders.content import SplitData, StoreData, describe_tokenizer, require_text, tokenised
from engine.loaders.formats import Choice, DataFiles, RawDataset, RawSplit, remarks
from engine.loaders.pooling import pool
from engine.loaders.problems import level_padding, level_widths, nan_words, problems
from engine.loaders.progress import with_progress
from engine.loaders.ragged import LengthRule
from engine.loaders.spool import spooled
from engine.loaders.store import CHUNK, KEY, VERSION, is_store, no_room, open_store, store_path, write_store
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer
from engine.vocabulary import LengthRule as LengthRuleSetting

READERS = 1  # raise it when readers make something else of the same files: stores of first use are then made anew
HEAD_BYTES = 1 << 20
LARGEST_HEADER = 1 << 27


def convert(
    src: str | Path,
    dst: str | Path,
    text_encoder: str = "minilm",
    length_rule: LengthRuleSetting = "auto",
    expected: str | None = None,
    choice: Choice | None = None,
    dtype: Literal["float32", "float16"] | None = None,
) -> Path:
    """Write the data of `src` as a store, with texts tokenised for `text_encoder`.

    Memory holds one block of samples at a time: what is read waits in unnamed files beside the store until it is
    written. An interrupted conversion leaves no store, and the next one removes what it left.

    Args:
        src: a file or folder of any format, or a store, whose texts are tokenised anew.
        dst: a name ending in .safetensors, or a folder that gets store.safetensors.
        text_encoder: the encoder whose tokeniser is applied; `features` keeps precomputed text features instead.
        length_rule: auto is `recorded`, or the rule of `src` if that is a store.
        expected: name of the format that the user says it is.
        choice: what to take if the data has several of a kind.
        dtype: of frames and text features; None is float32, or that of `src` if that is a store. float16 halves the
            file and rounds values to 11 bits.

    Returns:
        The store's file.

    Raises:
        DataError: the data cannot be used, or the store cannot be written.
    """
    needs_text = "text" in (choice or Choice()).modalities
    tokenizer = load_tokenizer(text_encoder) if needs_text and text_encoder != PRECOMPUTED else None
    target = store_path(dst)
    _require_replaceable(target)
    source = _files_under(src, target, choice)
    if source is None:
        data = _opened(src, target, length_rule)
    else:
        rule = "recorded" if length_rule == "auto" else length_rule
        try:
            sweep(target)
            room = next(p for p in target.absolute().parents if p.is_dir())
            data = read_source(source, rule, tokenizer, expected, fingerprint(source), room)
        except OutputError as problem:
            raise no_room(problem) from problem
        data.meta["sha256"] = source_sums(source)
    if needs_text:
        require_text(data, tokenizer, str(src), text_encoder)
    return write_store(target, tokenised(data, tokenizer) if tokenizer else data, dtype)


def _require_replaceable(target: Path) -> None:
    """Refuse a destination that holds something else than a store: a checkpoint has the same ending.

    Raises:
        DataError: it does.
    """
    if not target.is_file():
        return
    try:
        with target.open("rb") as file:
            header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER)))
            store = KEY in header["__metadata__"]
    except (ValueError, TypeError, LookupError):
        store = False
    if not store:
        do = "Choose another name, or remove the file."
        raise DataError(str(target), "a file that is no store", "a new name, or a store to replace", do)


def _files_under(src: str | Path, target: Path, choice: Choice | None) -> DataFiles | None:
    """The files to convert; None if `src` is a store. A store in the folder of its own files is made of them anew."""
    if not is_store(src):
        return formats.find_source(src, choice)
    if not user_path(src).is_dir() or store_path(src).resolve() != target.resolve():
        return None
    try:
        return formats.find_source(src, choice)
    except DataError:  # there are no files beside the store
        return None


def open_current(path: str | Path) -> StoreData:
    """Open a store. If its folder is named, the source files that are still there must be those it was made from.

    Only files with a later time than the store's are read for this.

    Raises:
        DataError: it is no store, or one of the files has changed since.
    """
    data = open_store(path)
    folder, file = user_path(path), store_path(path)
    if not folder.is_dir():
        return data
    for name, made_from in data.meta.get("sha256", {}).items():
        try:
            source = folder / name
            later = source.is_file() and source.stat().st_mtime_ns > file.stat().st_mtime_ns
            changed = later and _sha256(source) != made_from
        except (OSError, ValueError):  # a file that cannot be read is as good as absent
            continue
        if changed:
            named = shlex.quote(str(folder))
            raise DataError(
                str(folder), f"{name}, which has changed since {file.name} was made from it",
                "the files that it was made from",
                f"Convert again, with the same options (engine convert {named} {named} ...), or name the store itself "
                "to read it as it is.",
            )  # fmt: skip
    return data


def _opened(src: str | Path, target: Path, length_rule: str) -> StoreData:
    data = open_current(src)
    made = data.meta["length_rule"]
    if length_rule not in ("auto", made):
        raise DataError(
            str(src), f"a store made by length rule {made}", f"rule {length_rule}",
            "Convert the original files instead.",
        )  # fmt: skip
    if store_path(src).resolve() == target.resolve():
        raise DataError(str(target), "source and destination the same", "another destination", "Choose another name.")
    return data


def read_source(
    source: DataFiles,
    rule: LengthRule,
    tokenizer: Tokenizer | None,
    expected: str | None,
    mark: str,
    spool: Path | None,
    training: bool = True,
) -> StoreData:
    """Read foreign files.

    Args:
        spool: folder for what is read, which is then mapped; None keeps it in memory.

    Raises:
        DataError: the data cannot be used.
        OutputError: there is no space in `spool`.
    """
    with spooled(spool):
        reader = formats.choose_format(source, expected)
    asked = source.choice.label_key
    if training and asked not in ("auto", "classes") and not getattr(reader, "label_keys", False):
        raise DataError(
            str(source.path), f"a {reader.title} file, with data.label_key={asked}",
            "an MMSA file, which has several sets of labels", "Leave data.label_key at auto.",
        )  # fmt: skip
    with spooled(spool):
        raw = reader.read(source, rule, tokenizer is None and "text" in source.choice.modalities)
        level_padding(raw)
        pool(raw, {"audio": source.choice.pool_audio, "vision": source.choice.pool_vision})
    raw.notes += formats.registry.without_effect(reader, source.choice) if training else []
    return prepare(source, raw, rule, tokenizer, mark, training)


def prepare(
    source: DataFiles,
    raw: RawDataset,
    rule: LengthRule,
    tokenizer: Tokenizer | None,
    mark: str,
    training: bool = True,
) -> StoreData:
    """Check what a reader returned, and make it the content of a store.

    Args:
        mark: the source's fingerprint.
        training: whether the data must be fit for training, or only for prediction.

    Raises:
        DataError: see `problems`.
    """
    level_widths(raw)
    errors = problems(raw, str(source.path), source.choice.modalities, training)
    if errors:
        raise errors[0]
    splits, counts = {}, {}
    for name, split in raw.splits.items():
        text = split.text
        splits[name] = SplitData(
            split.ids, text, split.label, split.audio.ragged, split.vision.ragged,
            tokenizer.encode(text, raw.draws_words) if tokenizer is not None and text is not None else None,
            split.features.ragged if split.features else None,
        )  # fmt: skip
        counts[name] = _counts(split)
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
        "columns": raw.columns,
        "counts": counts,
        "notes": remarks(source, raw) + nan_words(raw),
    }
    return StoreData(meta, splits)


def _counts(split: RawSplit) -> dict[str, Any]:
    """What a store records of the cleaning of a split."""
    frames = {"audio": split.audio, "vision": split.vision}
    return {
        "samples": len(split.ids),
        "nonfinite": {m: part.nonfinite for m, part in frames.items()},
        "dropped": {m: part.dropped for m, part in frames.items()},
        "missing": {
            **{m: len(part.missing) for m, part in frames.items()},
            "text": sum(not t.strip() for t in split.text) if split.text is not None else 0,
            "features": len(split.features.missing) if split.features else 0,
        },
    }


def fingerprint(source: DataFiles) -> str:
    """A mark that changes whenever a source file changes, or what the readers make of it.

    It is the sha256 of `READERS`, and of names, sizes, times and the first MiB of the source's files and of the CSV
    files beside them, which may hold labels and texts. The source may have one further part per sample; only names,
    sizes and times of these count.
    """
    digest = hashlib.sha256(f"{READERS} ".encode())
    for part in source.parts:
        state = part.stat()
        digest.update(f"{part} {state.st_size} {state.st_mtime_ns} ".encode())
    beside = formats.csv_files(next(iter(source.files.values())).parent)
    for file in [*source.files.values(), *beside]:
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD_BYTES))
    return digest.hexdigest()


def source_sums(source: DataFiles) -> dict[str, str]:
    """sha256 of every file that data was read from, by its path below the source's folder.

    Publishers of data sets name them too.
    """
    files = list(dict.fromkeys([*source.files.values(), *source.parts]))
    folder, sums = files[0].parent, {}
    for path in with_progress(files, "computing checksums", "files"):
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        sums[name] = _sha256(path)
    return sums


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
