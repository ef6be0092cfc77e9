"""`engine convert`: foreign data to a store."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.errors import DataError, OutputError
from engine.files import sweep
from engine.loaders import formats
from engine.loaders.dataset import csv_beside, read_source, require_text, tokenised
from engine.loaders.formats import Choice
from engine.loaders.store import (
    StoreData,
    fingerprint,
    is_store,
    no_room,
    open_store,
    source_sums,
    store_path,
    write_store,
)
from engine.loaders.text import PRECOMPUTED, load_tokenizer


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
