"""MMSA and MMSA-FET pickles: aligned_50, unaligned_50, SIMS unaligned_39.

Layout: `d[split] = {raw_text (N,), id (N,), audio [N, La, da], vision [N, Lv, dv], regression_labels (N,)}` and
optional keys; ids are `video$_$clip`; padded with zeros on the RIGHT. Unaligned files record lengths, which are not
exact: frames after the recorded length are dropped. `text` holds precomputed features [N, Lt, d_t], `text_bert`
[N, 3, Lt] token ids, mask and types.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats import (
    SPLITS,
    RawDataset,
    RawSplit,
    Source,
    as_numbers,
    check_keys,
    check_rows,
    check_splits,
    may_be_labelled,
    nearest,
    present,
    read_labels,
    to_texts,
    unlabelled,
)
from engine.loaders.formats.declarelab import looks_like_mmsa
from engine.loaders.ragged import LengthRule, absent, from_padded

TITLE = "MMSA"
REQUIRED = ("id", "audio", "vision", "regression_labels")
OPTIONAL = (
    "raw_text", "text", "text_bert", "classification_labels", "annotations",
    "audio_lengths", "vision_lengths", "text_lengths",
    "regression_labels_T", "regression_labels_A", "regression_labels_V",
    "classification_labels_T", "classification_labels_A", "classification_labels_V",
)  # fmt: skip


LABELS = "regression_labels"
KEYS = (*REQUIRED, *OPTIONAL)


class MMSA:
    name = "mmsa"
    title = TITLE

    def recognises(self, source: Source) -> bool:
        splits = source.split_dict()
        first = next((v for k, v in splits.items() if k in SPLITS), None) if splits else None
        return isinstance(first, dict) and looks_like_mmsa(first)

    def read(self, source: Source, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        where = str(source.path)
        check_splits(where, splits)
        names = present(splits)
        modalities = source.choice.modalities
        gone = [m for m in _absent(splits, names) if m in modalities]
        frames = [m for m in ("audio", "vision") if m in modalities and m not in gone]
        text_key = ["text" if features else "raw_text"] if "text" in modalities else []
        for s in names:
            labels = [LABELS] if may_be_labelled(splits[s], LABELS, KEYS) else []
            need = ["id", *frames, *labels, *text_key]
            check_keys(f"{where}, {s}", splits[s], need, KEYS, TITLE)
        data = RawDataset(self.name, {}, notes=[f"the file has no {m}: it is missing in every sample" for m in gone])
        for s in names:
            split = splits.pop(s)
            count = check_rows(f"{where}, {s}/id", split["id"], TITLE)
            ids = [i.replace("$_$", "_") for i in to_texts(split["id"], f"{where}, {s}/id")]
            data.dtypes.update({m: str(getattr(split.get(m), "dtype", "")) for m in ("audio", "vision")})
            kept = "raw_text" in split and "text" in modalities
            text = None if not kept else to_texts(split["raw_text"], f"{where}, {s}/raw_text")
            if text is not None and len(text) != count:
                raise DataError(
                    f"{where}, {s}/raw_text", f"{len(text)} texts", f"{count}, one a sample", "Write one text a sample."
                )
            mask = _attended(split, count, f"{where}, {s}/text_bert") if features and "text_bert" in split else None
            embedded = split.pop("text", None)
            sequences = {
                m: from_padded(
                    split.pop(m), "right", rule, _lengths(split, m, count, f"{where}, {s}"), ids, f"{where}, {s}/{m}"
                )
                for m in frames
            } | {m: absent(count) for m in ("audio", "vision") if m not in frames}
            data.splits[s] = RawSplit(
                ids,
                text,
                read_labels(
                    split["regression_labels"],
                    count,
                    f"{where}, {s}/regression_labels",
                    ids,
                    source.choice.label_column,
                )
                if split.get(LABELS) is not None
                else unlabelled(count),
                **sequences,
                features=from_padded(embedded, "right", "recorded", mask, ids, f"{where}, {s}/text")
                if features
                else None,
            )
        return data


def _absent(splits: dict[str, Any], names: list[str]) -> list[str]:
    """Modalities of which no split has a key, spelt right or wrong: MMSA-FET leaves out what was not extracted."""
    keys = {str(k) for s in names if isinstance(splits[s], dict) for k in splits[s]}
    free = [k for k in keys if k not in KEYS]
    gone = [m for m in ("audio", "vision") if m not in keys and not nearest(m, free, 0.5)]
    return gone if len(gone) == 1 else []


def _lengths(split: dict[str, Any], modality: str, count: int, where: str) -> np.ndarray | None:
    """Recorded lengths, int64 [N], or None where the file has none (aligned files)."""
    key = f"{modality}_lengths"
    if key in split:
        try:
            lengths = np.asarray(split[key], np.float64).reshape(-1)
        except (TypeError, ValueError):
            lengths = np.zeros(0)
        wrong = (
            len(lengths) != count or not np.isfinite(lengths).all() or (lengths < 0).any() or (lengths % 1 != 0).any()
        )
        if wrong:
            raise DataError(
                f"{where}/{key}",
                f"{len(lengths)} values",
                f"{count} whole numbers",
                "Write one length a sample, or drop the key.",
            )
        return np.minimum(lengths, 1 << 31).astype(np.int64)
    return None


def _attended(split: dict[str, Any], count: int, where: str) -> np.ndarray:
    """Number of attended tokens, int64 [N]: what the precomputed text features are valid for."""
    bert = as_numbers(split["text_bert"], where, f"({count}, 3, tokens)")
    if bert.ndim != 3 or bert.shape[:2] != (count, 3):
        raise DataError(
            where, f"shape {bert.shape}", f"({count}, 3, tokens)", "Write ids, mask and types of every sample."
        )
    return np.count_nonzero(bert[:, 1], axis=1)
