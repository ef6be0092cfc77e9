"""`engine convert`: foreign data to a store."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.errors import DataError
from engine.loaders.dataset import load_prepared, require_text, tokenised
from engine.loaders.formats import Choice
from engine.loaders.store import is_store, store_path, write_store
from engine.loaders.text import PRECOMPUTED, load_tokenizer


def convert(
    src: str | Path,
    dst: str | Path,
    text_encoder: str = "minilm",
    length_rule: Literal["auto", "recorded", "all_zero", "sum_zero"] = "auto",
    expected: str | None = None,
    choice: Choice | None = None,
) -> Path:
    """Write the data of `src` as a store, texts tokenised for `text_encoder`.

    Args:
        src: a file or folder of any format, or a store (its texts are tokenised anew).
        dst: a name ending in .safetensors, or a folder that gets store.safetensors.
        text_encoder: whose tokeniser to apply; `features` keeps precomputed text features instead.
        length_rule: auto is `recorded`, or the rule of `src` where it is a store.
        expected: name of the format that the user says it is.
        choice: what to take where the data has several of a kind.

    Returns:
        The store's file.

    Raises:
        DataError: anything that keeps the data from being used or the store from being written.
    """
    tokenizer = None if text_encoder == PRECOMPUTED else load_tokenizer(text_encoder)
    data = load_prepared(src, length_rule, tokenizer, expected, cache=False, choice=choice)
    if is_store(src):
        made = data.meta["length_rule"]
        if length_rule not in ("auto", made):
            raise DataError(
                str(src),
                f"a store made by length rule {made}",
                f"rule {length_rule}",
                "Convert the original files instead.",
            )
        if store_path(src).resolve() == store_path(dst).resolve():
            raise DataError(str(dst), "source and destination the same", "another destination", "Choose another name.")
    require_text(data, tokenizer, str(src), text_encoder)
    return write_store(dst, tokenised(data, tokenizer) if tokenizer else data)
