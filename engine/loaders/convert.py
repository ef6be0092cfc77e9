"""From foreign files to the content of a store, and `engine convert`, which writes it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from engine import __version__
from engine.errors import DataError, OutputError
from engine.files import sweep
from engine.loaders import formats
from engine.loaders.content import SplitData, StoreData, describe_tokenizer, require_text, tokenised
from engine.loaders.formats import Choice, DataFiles, RawDataset, remarks
from engine.loaders.problems import level_widths, nan_words, problems
from engine.loaders.ragged import LengthRule
from engine.loaders.spool import spooled
from engine.loaders.store import CHUNK, VERSION, is_store, no_room, open_store, store_path, write_store
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer

HEAD_BYTES = 1 << 20


def convert(
    src: str | Path,
    dst: str | Path,
    text_encoder: str = "minilm",
    length_rule: Literal["auto", "recorded", "all_zero", "sum_zero"] = "auto",
    expected: str | None = None,
    choice: Choice | None = None,
    dtype: Literal["float32", "float16"] | None = None,
) -> Path:
    """Write the data of `src` as a store, texts tokenised for `text_encoder`.

    What is read goes to unnamed files beside the store until it is written: memory holds a block of samples at a time.
    A conversion that is interrupted leaves no store, and the next one removes what it left.

    Args:
        src: a file or folder of any format, or a store (its texts are tokenised anew).
        dst: a name ending in .safetensors, or a folder that gets store.safetensors.
        text_encoder: whose tokeniser to apply; `features` keeps precomputed text features instead.
        length_rule: auto is `recorded`, or the rule of `src` where it is a store.
        expected: name of the format that the user says it is.
        choice: what to take where the data has several of a kind.
        dtype: of frames and text features; None is float32, or that of `src` where it is a store. float16 halves the
            file and rounds values to 11 bits.

    Returns:
        The store's file.

    Raises:
        DataError: anything that keeps the data from being used or the store from being written.
    """
    needs_text = "text" in (choice or Choice()).modalities
    tokenizer = load_tokenizer(text_encoder) if needs_text and text_encoder != PRECOMPUTED else None
    target = store_path(dst)
    if is_store(src):
        data = _opened(src, target, length_rule)
    else:
        source = formats.find_source(src, choice)
        beside = csv_beside(source)
        rule = "recorded" if length_rule == "auto" else length_rule
        try:
            sweep(target)
            room = next(p for p in target.absolute().parents if p.is_dir())
            data = read_source(source, rule, tokenizer, expected, fingerprint(source, beside), room)
        except OutputError as problem:
            raise no_room(problem) from problem
        data.meta["sha256"] = source_sums(source, beside)
    if needs_text:
        require_text(data, tokenizer, str(src), text_encoder)
    return write_store(target, tokenised(data, tokenizer) if tokenizer else data, dtype)


def _opened(src: str | Path, target: Path, length_rule: str) -> StoreData:
    data = open_store(src)
    made = data.meta["length_rule"]
    if length_rule not in ("auto", made):
        raise DataError(
            str(src),
            f"a store made by length rule {made}",
            f"rule {length_rule}",
            "Convert the original files instead.",
        )
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
    """Read foreign files. `spool`: folder for what is read, which is then mapped; None holds it in memory.

    Raises:
        DataError: anything that keeps the data from being used.
        OutputError: no space in `spool`.
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
    return prepare(source, raw, rule, tokenizer, mark, training)


def prepare(
    source: DataFiles,
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


def csv_beside(source: DataFiles) -> list[Path]:
    """The CSV files beside a source, which may hold its labels and texts."""
    return formats.csv_files(next(iter(source.files.values())).parent)


def fingerprint(source: DataFiles, beside: list[Path]) -> str:
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


def source_sums(source: DataFiles, beside: list[Path]) -> dict[str, str]:
    """sha256 of every file that data was read from, by name: to compare with what its publisher says."""
    sums = {}
    for path in [*source.files.values(), *source.parts, *beside]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        sums[path.name] = digest.hexdigest()
    return sums
