"""MMSA and MMSA-FET pickles: aligned_50, unaligned_50, SIMS unaligned_39.

Layout: `d[split] = {raw_text (N,), id (N,), audio [N, La, da], vision [N, Lv, dv], regression_labels (N,)}` and
optional keys. Ids are `video$_$clip`. As a rule, zeros on the RIGHT are padding. MMSA-FET can pad on the left: if the
zeros lie there, that side is taken.

Unaligned files record lengths, which are not exact: frames after the recorded length are dropped and counted. `text`
holds precomputed features [N, Lt, d_t]; `text_bert` [N, 3, Lt] holds token ids, mask and types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import (
    SPLITS,
    as_numbers,
    check_keys,
    check_rows,
    check_splits,
    may_be_labelled,
    nearest,
    note_keys,
    present,
    read_labels,
    to_ids,
    to_texts,
    unlabelled,
)
from engine.loaders.formats.declarelab import looks_like_mmsa
from engine.loaders.formats.registry import RawDataset, RawSplit
from engine.loaders.formats.source import DataFiles
from engine.loaders.ragged import LengthRule, Side, absent, from_padded

TITLE = "MMSA"
REQUIRED = ("id", "audio", "vision", "regression_labels")
OPTIONAL = ("raw_text", "text", "text_bert", "audio_lengths", "vision_lengths")
UNREAD = (
    "classification_labels", "annotations", "text_lengths",
    "regression_labels_T", "regression_labels_A", "regression_labels_V",
    "classification_labels_T", "classification_labels_A", "classification_labels_V",
)  # fmt: skip


KEYS = (*REQUIRED, *OPTIONAL, *UNREAD)
LABELS = tuple(key for key in KEYS if "_labels" in key)


class MMSA:
    name = "mmsa"
    title = TITLE
    choices = ("label_column", "label_key")  # fields of `Choice` that it heeds
    label_keys = True  # see `Choice.label_key`

    def recognises(self, source: DataFiles) -> bool:
        splits = source.split_dict()
        first = next((v for k, v in splits.items() if k in SPLITS), None) if splits else None
        return isinstance(first, dict) and looks_like_mmsa(first)

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        where = str(source.path)
        notes = check_splits(where, splits)
        names, modalities = present(splits), source.choice.modalities
        key = _label_key(splits, names, source.choice.label_key, where)
        gone = _absent(splits, names, modalities, where)
        text_key = ["text" if features else "raw_text"] if "text" in modalities else []
        there = {s: [m for m in ("audio", "vision") if m in modalities and m not in gone[s]] for s in names}
        named = source.choice.label_key not in ("auto", "classes")
        unknown = {}
        for s in names:
            asked = named and s != "test" and _labelled(splits[s])  # a test split may be there to be predicted
            labels = [key] if asked or may_be_labelled(splits[s], key, KEYS) else []
            need = ["id", *there[s], *labels, *text_key]
            unknown[s] = check_keys(f"{where}, {s}", splits[s], need, (*REQUIRED, *OPTIONAL), TITLE, UNREAD)
        data = RawDataset(self.name, {}, notes=notes + note_keys(unknown) + _absence_notes(gone))
        for s in names:
            split = splits.pop(s)
            count = check_rows(f"{where}, {s}/id", split["id"], TITLE)
            ids = [i.replace("$_$", "_") for i in to_ids(split["id"], f"{where}, {s}/id")]
            data.dtypes.update({m: str(getattr(split[m], "dtype", "")) for m in there[s]})
            kept = "raw_text" in split and "text" in modalities
            text = None if not kept else to_texts(split["raw_text"], f"{where}, {s}/raw_text")
            if text is not None and len(text) != count:
                raise DataError(
                    f"{where}, {s}/raw_text", f"{len(text)} texts", f"{count}, one per sample",
                    "Write one text per sample.",
                )  # fmt: skip
            mask, text_side = None, "right"
            if features and "text_bert" in split:
                mask, text_side = _attended(split, count, f"{where}, {s}/text_bert")
            embedded = split.pop("text", None)
            sequences = {
                m: from_padded(
                    split.pop(m), "right", rule, _lengths(split, m, count, f"{where}, {s}"), ids, f"{where}, {s}/{m}"
                )
                for m in there[s]
            } | {m: absent(count) for m in ("audio", "vision") if m not in there[s]}
            data.splits[s] = RawSplit(
                ids,
                text,
                read_labels(split[key], count, f"{where}, {s}/{key}", ids, source.choice.label_column)
                if split.get(key) is not None
                else unlabelled(count),
                **sequences,
                features=from_padded(embedded, text_side, "recorded", mask, ids, f"{where}, {s}/text", least=0)
                if features
                else None,
            )
        return data


def _labelled(split: Any) -> bool:
    """Whether a split has labels of any set."""
    return isinstance(split, dict) and any(key in split for key in LABELS)


def _absent(splits: dict[str, Any], names: list[str], modalities: Sequence[str], where: str) -> dict[str, list[str]]:
    """Split -> the modality, of `modalities`, that it has no key of, spelt right or wrong. MMSA-FET omits what was not
    extracted.

    Raises:
        DataError: it has an unknown key with an array of sequences. This may be that modality under another name.
    """
    out = {}
    for s in names:
        keys = list(splits[s]) if isinstance(splits[s], dict) else []
        free = [k for k in keys if k not in KEYS]
        gone = [m for m in ("audio", "vision") if m not in keys and not nearest(m, free, 0.5)]
        asked = [m for m in gone if m in modalities]
        out[s] = asked if len(gone) == 1 else []
        arrays = [k for k in free if getattr(splits[s][k], "ndim", 0) == 3]
        if asked and arrays:
            m = asked[0]
            raise DataError(
                f"{where}, {s}", f"no {m!r}, but an unknown key {arrays[0]!r} with an array of sequences",
                f"the keys of an {TITLE} file",
                f"Rename {arrays[0]!r} to {m!r} if it is that; else remove the key, or leave {m} out of "
                "data.modalities.",
            )  # fmt: skip
    return out


def _absence_notes(gone: dict[str, list[str]]) -> list[str]:
    notes = []
    for m in ("audio", "vision"):
        lacking = [s for s in gone if m in gone[s]]
        if lacking:
            where = "the file has" if len(lacking) == len(gone) else f"{', '.join(lacking)} has"
            notes.append(f"{where} no {m}: it is missing in every sample")
    return notes


def _label_key(splits: dict[str, Any], names: list[str], asked: str, where: str) -> str:
    """The key of the labels that are asked for."""
    if asked == "auto":
        return "regression_labels"
    if asked == "classes":
        labelled = [s for s in names if _labelled(splits[s])]
        every = labelled and all("classification_labels" in splits[s] for s in labelled)
        return "classification_labels" if every else "regression_labels"
    if asked not in LABELS:
        near = nearest(asked, LABELS, 0.5)
        do = f"Did you mean {near[0]}?" if near else "Name one of them."
        raise DataError(f"{where}, data.label_key", repr(asked), f"one of {', '.join(LABELS)}", do)
    return asked


def _lengths(split: dict[str, Any], modality: str, count: int, where: str) -> np.ndarray | None:
    """Recorded lengths, int64 [N], or None where the file has none (aligned files)."""
    key = f"{modality}_lengths"
    if key in split:
        try:
            lengths = np.asarray(split[key], np.float64).reshape(-1)
        except (TypeError, ValueError):
            lengths = np.zeros(0)
        wrong = np.flatnonzero(~((lengths >= 0) & (lengths % 1 == 0)))  # NaN and infinity too
        if len(lengths) != count or len(wrong):
            found = f"{len(lengths)} values" if len(lengths) != count else f"{lengths[wrong[0]]:g} in row {wrong[0]}"
            raise DataError(
                f"{where}/{key}", found, f"{count} whole numbers", "Write one length per sample, or drop the key."
            )
        return np.minimum(lengths, 1 << 31).astype(np.int64)
    return None


def _attended(split: dict[str, Any], count: int, where: str) -> tuple[np.ndarray, Side]:
    """Number of attended tokens, int64 [N], and the side of the padding. Text features are valid for these tokens."""
    bert = as_numbers(split["text_bert"], where, f"({count}, 3, tokens)")
    if bert.ndim != 3 or bert.shape[:2] != (count, 3):
        raise DataError(
            where, f"shape {bert.shape}", f"({count}, 3, tokens)", "Write ids, mask and types of every sample."
        )
    mask = bert[:, 1] != 0
    starts, ends = np.count_nonzero(mask[:, :1]), np.count_nonzero(mask[:, -1:])
    return np.count_nonzero(mask, axis=1), "left" if ends > starts else "right"
