"""What keeps a data set from being used, and what is only noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.config import MODALITIES
from engine.errors import DataError
from engine.loaders.content import SplitData
from engine.loaders.formats import SPLITS, RawDataset, RawSplit
from engine.loaders.formats.checks import missing_split
from engine.loaders.ragged import PADDED, absent, unpadded

NAN_WORDS = ("nan", "none", "null", "<na>", "n/a")


def level_widths(raw: RawDataset) -> None:
    """A split that lacks a modality in every sample gets the width that the modality has in the other splits."""
    for modality in ("audio", "vision", "features"):
        parts = {n: p for n, s in raw.splits.items() if (p := getattr(s, modality)) is not None}
        present = [p.ragged.dim for p in parts.values() if len(p.missing) < len(p.ragged)]
        for name, part in parts.items():
            if present and len(part.missing) == len(part.ragged) and part.ragged.dim != present[0]:
                setattr(raw.splits[name], modality, absent(len(part.ragged), present[0]))


def level_padding(raw: RawDataset) -> None:
    """A split of too few sequences to tell padding has it where the other splits have, if it has their length.

    This matters for formats without padding, where zeros are taken for padding only if enough sequences show it.
    """
    for modality in ("audio", "vision", "features"):
        parts = {n: p for n, s in raw.splits.items() if (p := getattr(s, modality)) is not None}
        found = {(p.side, p.padded_to) for p in parts.values() if p.side is not None and p.padded_to is not None}
        if len(found) != 1:
            continue
        ((side, length),) = found
        for name, part in parts.items():
            few = len(part.ragged) - len(part.missing) < PADDED
            if few and part.usual is None and part.padded_to is None:
                setattr(raw.splits[name], modality, unpadded(part, side, length))


def nan_words(raw: RawDataset) -> list[str]:
    """A note on texts that are a word such as nan, which an empty cell often becomes; else none."""
    counts = {n: sum(t.strip().lower() in NAN_WORDS for t in s.text or []) for n, s in raw.splits.items()}
    counts = {n: count for n, count in counts.items() if count}
    if not counts:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"{sum(counts.values())} texts are a word such as nan or None, kept as they are: empty those cells if "
            f"nothing was said ({listed})"]  # fmt: skip


def training_problems(splits: Mapping[str, SplitData | RawSplit], where: str) -> list[DataError]:
    """What keeps samples that can be predicted from being trained on: missing splits or labels.

    The test split may have no label at all: then it is held back.
    """
    if len(splits) < len(SPLITS):
        return [missing_split(where, list(splits))]
    errors = []
    for name, split in splits.items():
        gone = np.flatnonzero(np.isnan(split.label[:, 0]))
        if len(gone) and not (name == "test" and held_back(split)):
            row = int(gone[0])
            errors.append(DataError(
                f"{where}, {name}, labels, row {row} (id {split.ids[row]})",
                f"label nan ({len(gone)} of {len(split.ids)} samples have none)",
                "a finite number" + (", or no label in the whole split" if name == "test" else ""),
                "Correct or remove the row.",
            ))  # fmt: skip
    return errors


def held_back(split: SplitData | RawSplit) -> bool:
    """Whether no sample of a split has a label."""
    return bool(np.isnan(split.label).all())


def problems(
    raw: RawDataset, where: str, modalities: Sequence[str] = MODALITIES, training: bool = True
) -> list[DataError]:
    """What keeps a data set from being used: ids that occur twice, and widths that differ between splits.

    Training also needs all splits, labels and texts.
    """
    errors = training_problems(raw.splits, where) if training else []
    seen: dict[str, tuple[str, int]] = {}
    for name, split in raw.splits.items():
        for row, sample in enumerate(split.ids):
            if sample in seen:
                other, first = seen[sample]
                errors.append(DataError(
                    f"{where}, {name}, row {row}", f"id {sample} a second time",
                    f"every id once ({other}, row {first} has it)", "Remove one of them.",
                ))  # fmt: skip
            else:
                seen[sample] = (name, row)
        if _has_nothing(split):
            errors.append(DataError(
                f"{where}, {name}", "no text, audio or vision in any sample", "one of them at least",
                "Check the feature extraction.",
            ))  # fmt: skip
    errors += _no_text(raw, where) if training else []
    for modality in [m for m in ("audio", "vision") if m in modalities] + ["features"]:
        parts = {n: getattr(s, modality) for n, s in raw.splits.items()}
        dims = {n: p.ragged.dim for n, p in parts.items() if p is not None}
        if len(set(dims.values())) > 1:
            listed = ", ".join(f"{d} in {n}" for n, d in dims.items())
            errors.append(DataError(
                f"{where}, {modality}", f"{listed} feature columns", "the same number in every split",
                "Extract all splits alike.",
            ))  # fmt: skip
    return errors


def _silent(split: RawSplit) -> bool:
    return split.text is None or not any(t.strip() for t in split.text)


def _has_nothing(split: RawSplit) -> bool:
    parts = [p for p in (split.audio, split.vision, split.features) if p is not None]
    return _silent(split) and all(len(p.missing) == len(split.ids) for p in parts)


def _no_text(raw: RawDataset, where: str) -> list[DataError]:
    """Errors of a data set without a single text. One split may lack texts, as it may lack audio or vision."""
    splits = raw.splits.values()
    if all(s.features is not None and len(s.features.missing) == len(s.ids) for s in splits):
        expected = "precomputed text features, as text_encoder=features says"
        return [DataError(f"{where}, text", "zeros in all text features", expected, "Name a text encoder.")]
    if all(s.text is not None and _silent(s) for s in splits):
        do = "Give a file with transcripts, or text_encoder=features."
        return [DataError(where, "no text in any sample", "transcripts", do)]
    return []
