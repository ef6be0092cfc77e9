"""Lists of rows in the layout of the reference, one file per split: CMU-SDK features and AVEC2019 interviews.

- SDK (mosi, mosei): rows `[[text_features, audio_features, vision_features], label, label_2, label_7, segment]`; POM:
  `[[...], label (18 traits), label_7, segment]`. Each of the three lists holds one array per feature set, word-aligned:
  text (words, glove, last_hidden, ...), audio (covarep, eb10, is09), vision (facet41, facet42, openface).
- AVEC2019: rows `[text, mfcc, ege, ds, au, resnet, label]`. `text` is an array of sentences, one per step. Every
feature
  set has one row per step. The label is PHQ-8 / 25, in [0, 1].

`data.audio_features` and `data.vision_features` choose the feature sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import as_numbers, check_rows, check_splits, present, to_id, to_texts
from engine.loaders.formats.registry import RawDataset, RawSplit, first_rows, row_family, splits_with_words
from engine.loaders.formats.source import DataFiles
from engine.loaders.formats.tuples import stacked_labels
from engine.loaders.ragged import LengthRule, absent, from_sequences

TEXT_SETS = ("text", "glove", "last_hidden", "masked_last_hidden", "pooler", "summed_last_four")
AUDIO_SETS = ("covarep", "eb10", "is09")
VISION_SETS = ("facet41", "facet42", "openface")
AVEC_AUDIO, AVEC_VISION = ("mfcc", "ege", "ds"), ("au", "resnet")
PHQ_MOST = 1.0


class SDKRows:
    name = "sdk"
    title = "list of CMU-SDK features (MIMRL)"
    choices = ("audio_features", "vision_features", "text_features", "label_column")  # fields of `Choice` that it heeds
    row = "[[text, audio, vision], label, ..., segment]"

    def recognises(self, source: DataFiles) -> bool:
        return first_rows(source) == self.name

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        source.notes += check_splits(str(source.path), splits)
        data = RawDataset(self.name, {}, cut=True)
        for s in present(splits):
            data.splits[s] = self._split(splits.pop(s), f"{source.files.get(s, source.path)}, {s}", source, features)
        data.dtypes = {"audio": "float32", "vision": "float32"}
        return data

    def _split(self, rows: Any, where: str, source: DataFiles, features: bool) -> RawSplit:
        choice = source.choice
        check_rows(where, rows, self.title)
        ids, text, label, embedded, audio, vision = [], [], [], [], [], []
        sets: dict[str, tuple[str, int]] = {}
        for i, row in enumerate(rows):
            at = f"{where}, row {i}"
            if row_family(row) != self.name:
                raise DataError(at, "another kind of row", self.row, "Write every row alike.")
            (l_parts, a_parts, v_parts), value, name = row[0], row[1], row[-1]
            ids.append(to_id(name, f"{at}, segment"))
            if i == 0:
                embeddings = _names("text", l_parts, at)[1:]
                if features and not embeddings:
                    raise DataError(
                        at, "no text features beside the words", "glove, last_hidden, ...", "Name a text encoder."
                    )
                sets = {
                    kind: _chosen(choice.of(kind, _names(kind, parts, at), at), parts, kind)
                    for kind, parts in (("audio", a_parts), ("vision", v_parts))
                    if kind in choice.modalities
                }
                if features:
                    best = ["last_hidden"] if "last_hidden" in embeddings else []
                    sets["text"] = _chosen(choice.of("text", dict.fromkeys(best + embeddings), at), l_parts, "text")
            if "text" in choice.modalities:
                text.append(" ".join(to_texts(_part(l_parts, 0, f"{at}, words"), f"{at}, words")))
            label.append(as_numbers(value, f"{at}, label", "numbers").reshape(-1))
            parts = {"audio": a_parts, "vision": v_parts, "text": l_parts}
            for kind, out in (("audio", audio), ("vision", vision), ("text", embedded)):
                if kind in sets:
                    name, number = sets[kind]
                    frames = _part(parts[kind], number, f"{at}, {name}")
                    out.append(frames[None] if isinstance(frames, np.ndarray) and frames.ndim == 1 else frames)
        return RawSplit(
            ids, text if "text" in choice.modalities else None,
            stacked_labels(label, where, ids, choice.label_column),
            from_sequences(audio, ids, f"{where}, {sets['audio'][0]}") if "audio" in sets else absent(len(ids)),
            from_sequences(vision, ids, f"{where}, {sets['vision'][0]}") if "vision" in sets else absent(len(ids)),
            from_sequences(embedded, ids, f"{where}, {sets['text'][0]}") if features else None,
        )  # fmt: skip


def _names(kind: str, parts: Any, where: str) -> list[str]:
    """Names of one modality's feature sets, by how many there are."""
    if not len(parts):
        raise DataError(where, f"no {kind} features", "at least one array", "Write every modality's features.")
    known = {"text": TEXT_SETS, "audio": AUDIO_SETS, "vision": VISION_SETS}[kind]
    if kind == "vision" and len(parts) == 1:
        return ["facet42"]  # MOSEI has no other
    return [known[i] if i < len(known) else str(i) for i in range(len(parts))]


def _chosen(name: str, parts: Any, kind: str) -> tuple[str, int]:
    return name, _names(kind, parts, "").index(name)


def _part(parts: Any, number: int, where: str) -> Any:
    if number >= len(parts):
        raise DataError(where, f"{len(parts)} feature sets", "as many as in the first row", "Write every row alike.")
    return parts[number]


class AVEC2019:
    name = "avec2019"
    title = "list of AVEC2019 interviews (MIMRL)"
    choices = ("audio_features", "vision_features", "label_column")  # fields of `Choice` that it heeds
    row = "[text, mfcc, ege, ds, au, resnet, label]"

    def recognises(self, source: DataFiles) -> bool:
        return first_rows(source) == self.name

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        splits = splits_with_words(source, self.title, features)
        data = RawDataset(self.name, {}, draws_words=True, cut=True)
        for s in present(splits):
            data.splits[s] = self._split(splits.pop(s), f"{source.files.get(s, source.path)}, {s}", s, source)
        data.dtypes = {"audio": "float32", "vision": "float32"}
        return data

    def _split(self, rows: Any, where: str, split: str, source: DataFiles) -> RawSplit:
        choice = source.choice
        count = check_rows(where, rows, self.title)
        names = (*AVEC_AUDIO, *AVEC_VISION)
        audio_set = choice.of("audio", AVEC_AUDIO, where)
        vision_set = choice.of("vision", AVEC_VISION, where)
        ids = [f"{split}_{i}" for i in range(count)]  # the files have none
        text, label, audio, vision = [], [], [], []
        for i, row in enumerate(rows):
            at = f"{where}, row {i}"
            if row_family(row) != self.name:
                raise DataError(at, "another kind of row", self.row, "Write every row alike.")
            sentences = to_texts(row[0], f"{at}, text")
            text.append("\n".join(" ".join(s.split()) for s in sentences))
            label.append(as_numbers(row[-1], f"{at}, label", "a number").reshape(-1))
            for name, out in ((audio_set, audio), (vision_set, vision)):
                frames = as_numbers(row[1 + names.index(name)], f"{at}, {name}", "numbers of shape (steps, features)")
                if frames.shape[:1] != (len(sentences),):
                    raise DataError(
                        f"{at}, {name}", f"shape {frames.shape}", f"a row for each of the {len(sentences)} sentences",
                        "Write text and features step by step.",
                    )  # fmt: skip
                out.append(frames)
        labels = stacked_labels(label, where, ids, choice.label_column)
        beyond = np.flatnonzero((labels[:, 0] < 0) | (labels[:, 0] > PHQ_MOST))
        if len(beyond):
            raise DataError(
                f"{where}, row {beyond[0]}", f"label {labels[beyond[0], 0]:g}", "PHQ-8 / 25, in [0, 1]",
                "Divide the scores by 25.",
            )  # fmt: skip
        return RawSplit(
            ids, text, labels, from_sequences(audio, ids, f"{where}, {audio_set}"),
            from_sequences(vision, ids, f"{where}, {vision_set}"),
        )  # fmt: skip
