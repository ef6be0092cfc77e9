"""From a path to normalised batches: the only thing a trainer needs of this package."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.config import AugmentConfig, DataConfig
from engine.errors import DataError, printable
from engine.kernels.ragged import Source
from engine.loaders.augment import Augmentation
from engine.loaders.cache import load_prepared
from engine.loaders.content import SplitData, StoreData, require_modalities, require_text, tokenised
from engine.loaders.formats import Choice
from engine.loaders.loader import Kind, Loader, Padding, build, choose
from engine.loaders.normalize import ColumnNormalizer, Normalizer
from engine.loaders.problems import held_back, training_problems
from engine.loaders.ragged import Ragged
from engine.loaders.sampler import Lengths, Sampler, torchrun_shard
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer

Modality = Literal["audio", "vision"]
UNKNOWN_SHARE = 0.1  # of tokens: above it the text encoder is hardly the right one

log = logging.getLogger("engine")


class DataWarning(UserWarning):
    """Something in the data that is handled, and that the user should know of."""


@dataclass
class DataReport:
    """What was met while reading.

    Attributes:
        format, source: what was read.
        nonfinite: split -> modality -> values replaced by 0.
        missing: split -> modality -> samples without it.
        notes: remarks of the reader.
        unknown: split -> (unknown, all) tokens of its texts.
    """

    format: str
    source: str
    length_rule: str
    nonfinite: dict[str, dict[str, int]]
    missing: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    unknown: dict[str, tuple[int, int]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Sentences for the user; none where nothing was met."""
        out = []
        for modality in ("audio", "vision", "text", "features"):
            gone = {s: m[modality] for s, m in self.missing.items() if m.get(modality)}
            bad = {s: m[modality] for s, m in self.nonfinite.items() if m.get(modality)}
            if gone:
                kept = "an empty text" if modality == "text" else "one zero frame"
                name = "text features" if modality == "features" else modality
                out.append(f"{sum(gone.values())} samples without {name}, kept as {kept} ({_listed(gone)})")
            if bad:
                out.append(f"{sum(bad.values())} NaN or infinite {modality} values replaced by 0 ({_listed(bad)})")
        unknown, tokens = (sum(counts) for counts in zip((0, 0), *self.unknown.values(), strict=True))
        if unknown > UNKNOWN_SHARE * tokens:
            shares = ", ".join(f"{name} {100 * u / max(n, 1):.0f} %" for name, (u, n) in self.unknown.items())
            out.append(
                f"{100 * unknown / tokens:.0f} % of the tokens are unknown to the text encoder, which reads nothing in "
                f"them ({shares}): name one of the texts' language with text_encoder"
            )
        return out + self.notes


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


class Split:
    """One split, normalised, in file order.

    Attributes:
        ids: N names. text: N transcripts ("" where the data has none).
        label: float32 [N, 1]; NaN where a sample has none.
        tokens: ragged int32 or None; features: ragged float32 or None.
        precision: dtype of normalised frames, "float32" or "float16".
    """

    def __init__(
        self,
        data: SplitData,
        normalizer: Normalizer,
        tokenizer: Tokenizer | None,
        draws_words: bool = False,
        cut: int | None = None,
        precision: str = "float32",
    ):
        self._data, self._normalizer, self._cut, self.precision = data, normalizer, cut, precision
        self._draws_with = tokenizer if draws_words else None
        self._drawn: tuple[tuple[int, int], Ragged] | None = None
        self._kept: dict[str, Ragged] = {}  # frames cut to `cut`
        self._tensors: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        tokenised = tokenizer is not None
        self.ids = data.ids
        self.text = data.text if data.text is not None else [""] * len(data)
        self.label = torch.from_numpy(np.array(data.label, np.float32))
        self.tokens = data.tokens if tokenised else None
        self.features = None if tokenised else data.features

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def draws_words(self) -> bool:
        """Whether `text_rows` depends on `draw`."""
        return self._draws_with is not None

    def text_rows(self, draw: tuple[int, int] | None = None) -> Ragged:
        """Tokens or text features; where the data draws words (AVEC2019), those of `draw` = (seed, epoch)."""
        if self.tokens is None:
            self._data.check()
            return self.features
        if self._draws_with is None or draw is None:
            return self.tokens
        if self._drawn is None or self._drawn[0] != draw:
            self._drawn = (draw, self._draws_with.encode(self.text, True, *draw))
        return self._drawn[1]

    @cached_property
    def audio(self) -> Ragged:
        """Normalised frames in memory, made on first use."""
        return self._frames("audio")

    @cached_property
    def vision(self) -> Ragged:
        """Normalised frames in memory, made on first use."""
        return self._frames("vision")

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own tensors."""
        return {k: v for k, v in self.__dict__.items() if k not in ("audio", "vision")} | {"_tensors": {}}

    def _frames(self, key: Modality) -> Ragged:
        raw = self._raw(key)
        dtype = np.float16 if self.precision == "float16" else np.float32
        return Ragged(self._normalizer.apply(key, raw.values, dtype, self._data.check), np.asarray(raw.offsets))

    def _raw(self, key: Modality) -> Ragged:
        stored = getattr(self._data, key)
        if self._cut is None:
            return stored
        if key not in self._kept:
            self._kept[key] = stored.cut(self._cut)
        return self._kept[key]

    def normalizer(self, key: Modality) -> ColumnNormalizer:
        """The statistics of a modality."""
        return getattr(self._normalizer, key)

    def lengths(self, key: Modality) -> np.ndarray:
        """Frames of every sample, int64 [N]."""
        return self._raw(key).lengths

    def gather(self, key: Modality, rows: np.ndarray) -> Ragged:
        """Frames of some samples, read now, normalised and in this split's precision.

        Raises:
            DataError: the store has changed since it was opened.
        """
        self._data.check()
        raw = self._raw(key).take(rows)
        self._data.check()
        dtype = np.float16 if self.precision == "float16" else np.float32
        return Ragged(self._normalizer.apply(key, raw.values, dtype), raw.offsets)

    def source(self, key: Modality) -> Source | None:
        """Frames as stored, to be normalised where they are padded; None where numpy must do that.

        The caller asks `check` before they are read and after it.

        Raises:
            DataError: another number of columns than on train.
        """
        column = self.normalizer(key)
        if column.log or self.precision == "float16":
            return None
        raw = self._raw(key)
        return Source(*_viewed(raw), scale=column.linear(raw.values))

    def mapped(self, key: Literal["tokens", "features"]) -> tuple[Tensor, Tensor]:
        """Values and offsets where they lie, mapped from the store or not."""
        return _viewed(getattr(self, key))

    def check(self) -> None:
        """Raise DataError where the store has changed since it was opened."""
        self._data.check()

    def views(self, key: Modality, rows: np.ndarray) -> list[np.ndarray]:
        """Frames of some samples as stored, float32, to be copied at once.

        Raises:
            DataError: the store has changed since it was opened.
        """
        self._data.check()
        raw = self._raw(key)
        return [raw[i].astype(np.float32, copy=False) for i in rows.tolist()]

    def tensors(self, key: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values and offsets of `audio`, `vision`, `tokens` or `features` on a device, put there on first use."""
        if (key, device) not in self._tensors:
            ragged = getattr(self, key)
            self._data.check()
            values, offsets = (torch.from_numpy(_owned(a)) for a in (ragged.values, ragged.offsets))
            self._data.check()
            self._tensors[key, device] = values.to(device), offsets.to(device)
        return self._tensors[key, device]

    @property
    def frame_bytes(self) -> int:
        """Memory that the resident loader needs for this split; 0 where it has it already."""
        if any(key == "audio" for key, _ in self._tensors) or "audio" in self.__dict__:
            return 0
        size = 2 if self.precision == "float16" else 4
        return sum(self._raw(k).values.size for k in ("audio", "vision")) * size


def _beyond(data: StoreData, most: int) -> list[str]:
    """Notes on the frames that are cut off after `most`."""
    notes = []
    for key in ("audio", "vision"):
        lost = {n: int(np.maximum(getattr(s, key).lengths - most, 0).sum()) for n, s in data.splits.items()}
        lost = {name: count for name, count in lost.items() if count}
        if lost:
            notes.append(f"{key}: {sum(lost.values())} frames beyond data.time_len={most} left out ({_listed(lost)})")
    return notes


def _viewed(ragged: Ragged) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of arrays that are read-only: nobody writes to these
        return torch.from_numpy(ragged.values), torch.from_numpy(ragged.offsets)


def _owned(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it where it is a view of a mapped file (read-only), which may change or end."""
    return array if array.flags.writeable else np.array(array)


def _label(split: Split, task: Literal["regression", "classification"]) -> Tensor:
    return split.label if task == "regression" else _classes(split)


def _classes(split: Split) -> Tensor:
    """Class numbers, int64 [N]; -1 where a sample has none."""
    label = split.label[:, 0].nan_to_num(-1.0)
    wrong = torch.nonzero(~split.label[:, 0].isnan() & ((label != label.round()) | (label < 0)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"label, row {row} (id {split.ids[row]})",
            f"{float(label[row]):g}",
            "a class number 0, 1, 2, ...",
            "Use model.task=regression, or name the labels that hold classes (data.label_key, data.label_column).",
        )
    return label.long()


class Dataset:
    """An open data set.

    Attributes:
        splits: "train", "valid", "test" -> Split, those that there are.
        audio_dim, vision_dim, text_dim: feature columns; text_dim is 0 unless text features are precomputed. Those of a
            modality that is not in data.modalities are 0.
        tokenizer: whose tokens the texts have; None without tokens.
        normalizer: the statistics in use.
        report: what was replaced or missing.
        pad_id, closing_id, time_len: of the tokens in batches.
    """

    def __init__(self, data: StoreData, config: DataConfig, tokenizer: Tokenizer | None, normalizer: Normalizer | None):
        meta, modalities = data.meta, config.modalities
        tokenizer = tokenizer if "text" in modalities else None
        data = StoreData(meta, {name: split.only(modalities) for name, split in data.splits.items()})
        self.time_len, self.tokenizer = config.time_len, tokenizer
        # without a training split (in prediction) there are statistics, and any split has the widths
        train = data.splits.get("train") or next(iter(data.splits.values()))
        train.check()
        self.normalizer = normalizer or Normalizer.fit(train, config)
        train.check()
        self.pad_id = tokenizer.pad_id if tokenizer else 0
        self.closing_id = tokenizer.closing_id if tokenizer else -1
        self._empty = tokenizer.encode([""]).values.tolist() if tokenizer else []
        self._unknown = tokenizer.unknown if tokenizer else 0
        if normalizer is not None:
            data = _as_trained(data, normalizer)
            train = data.splits.get("train") or next(iter(data.splits.values()))
        if tokenizer is not None:
            data = tokenised(data, tokenizer)
        self.splits = {
            name: Split(
                split,
                self.normalizer,
                tokenizer,
                meta.get("draws_words", False),
                config.time_len if meta.get("cut") else None,
                config.precision,
            )
            for name, split in data.splits.items()
        }
        self.audio_dim = train.audio.dim if "audio" in modalities else 0
        self.vision_dim = train.vision.dim if "vision" in modalities else 0
        precomputed = "text" in modalities and tokenizer is None and train.features is not None
        self.text_dim = train.features.dim if precomputed else 0
        self._content = data
        counts, counted = meta["counts"], (*modalities, *(["features"] if "text" in modalities else []))
        self.report = DataReport(
            meta["format"],
            meta["source"],
            meta["length_rule"],
            *(
                {name: {m: n for m, n in c[kind].items() if m in counted} for name, c in counts.items()}
                for kind in ("nonfinite", "missing")
            ),
            list(meta["notes"]) + (_beyond(data, config.time_len) if meta.get("cut") else []),
            {n: tokenizer.unknown_share(s.tokens) for n, s in data.splits.items()} if tokenizer else {},
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's content, see `StoreData.fingerprints`."""
        return self._content.fingerprints()

    def loader(
        self,
        split: str,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        pad_tokens_to: int | None = None,
        drop_last: bool = False,
        drop_singleton: bool = False,
        task: Literal["regression", "classification"] = "regression",
        draw_words: bool = False,
        *,
        device: torch.device | str = "cpu",
        kind: Kind = "auto",
        workers: int | None = None,
        max_padding: float | None = None,
        shard: tuple[int, int] | Literal["torchrun"] = (0, 1),
        augment: AugmentConfig | None = None,
    ) -> Loader:
        """Batches of `split`.

        Args:
            shuffle: False keeps file order.
            seed: of the shuffled order, together with the epoch.
            pad_tokens_to: width of the token tensor; None pads to the longest of the batch.
            drop_last: leave out a short last batch. drop_singleton: leave it out where it is one sample.
            task: classification gives int64 labels [B].
            draw_words: where the data draws one word a sentence (AVEC2019), draw anew every epoch, as training does;
                False gives the fixed draw of evaluation.
            device: where the batches' tensors are.
            kind: auto picks by memory; every kind gives the same batches.
            workers: processes of the torch loader, threads of the DALI one; None lets it choose.
            max_padding: see `Sampler`.
            shard: (rank, world size) of this process, or "torchrun" to take it from the environment.
            augment: random changes of the samples, by `seed` and epoch; None, or all chances 0: none.

        Raises:
            DataError: task is classification and a label is not a class number.
            ConfigError: kind dali where DALI is not installed; torchrun's environment is not one.
        """
        data, device = self.splits[split], torch.device(device)
        lengths = None
        if max_padding is not None:
            columns = np.stack([data.lengths("audio"), data.lengths("vision")], 1)
            lengths = Lengths(columns, np.array([max(self.audio_dim, 1), max(self.vision_dim, 1)]))
        sampler = Sampler(
            len(data), batch_size, shuffle, seed, drop_last, drop_singleton, max_padding,
            torchrun_shard() if shard == "torchrun" else shard, lengths,
        )  # fmt: skip
        padding = Padding(self.time_len, self.pad_id, self.closing_id, pad_tokens_to)
        size = sum(self.splits[name].frame_bytes for name in self.splits) if data.frame_bytes else 0
        chosen, why = choose(kind, size, device)
        log.info("%s split: loader %s (%s)", split, chosen, why)
        augmentation = None
        if augment is not None and any(augment.model_dump().values()):
            augmentation = Augmentation(augment, seed, self._empty, self._unknown, self.pad_id)
        return build(
            chosen, data, sampler, padding, _label(data, task), device=device, draw_words=draw_words, why=why,
            workers=workers, augmentation=augmentation,
        )  # fmt: skip


def _as_trained(data: StoreData, normalizer: Normalizer) -> StoreData:
    """The same data, a modality that a split lacks in every sample as wide as in the run's training data."""
    splits = {}
    for name, split in data.splits.items():
        missing = data.meta["counts"][name]["missing"]
        gone = [m for m in ("audio", "vision") if missing.get(m) == len(split)]
        splits[name] = split.widened({m: getattr(normalizer, m).dim for m in gone})
    return StoreData(data.meta, splits)


def choice_of(data: DataConfig) -> Choice:
    """What the settings say to take where the data has several of a kind."""
    return Choice(
        data.audio_features,
        data.vision_features,
        data.text_features,
        data.label_column,
        data.align,
        data.label_key,
        tuple(data.modalities),
    )


def open_dataset(
    path: str | Path,
    data: DataConfig,
    text_encoder: str = "minilm",
    normalizer: Normalizer | None = None,
    expected: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    training: bool = True,
) -> Dataset:
    """Open a data set for training or evaluation.

    Foreign formats are converted on first use; the store is kept beside the source, or in the user's cache folder where
    that cannot be written to. What was replaced or is missing is told once, as DataWarning.

    Args:
        path: a file or folder of any format, or a store.
        data: modalities, length rule, normalisation and time_len are used.
        text_encoder: whose tokeniser to apply; `features` uses precomputed text features.
        normalizer: statistics to use instead of fitting on this data's training split.
        expected: name of the format that the user says it is.
        tokenizer: to use instead of looking for that of `text_encoder`.
        training: False opens data that is only to be predicted: one split will do, labels may be missing (NaN), and
            `normalizer` has to be given.

    Raises:
        DataError: anything that keeps the data from being used.
    """
    if text_encoder == PRECOMPUTED or "text" not in data.modalities:
        tokenizer = None
    elif tokenizer is None:
        tokenizer = load_tokenizer(text_encoder)
    expected = expected or (None if data.format == "auto" else data.format)
    choice = choice_of(data)
    content = load_prepared(path, data.length_rule, tokenizer, expected, choice, training)
    require_modalities(content, data.modalities, str(path))
    if "text" in data.modalities:
        require_text(content, tokenizer, str(path), text_encoder)
    found = training_problems(content.splits, str(path)) if training else []
    if found:
        raise found[0]
    dataset = Dataset(content, data, tokenizer, normalizer)
    made = content.meta["length_rule"]
    if made != data.length_rule and data.length_rule != "auto":
        dataset.report.notes.append(
            f"the store was made by length rule {made}, not {data.length_rule}: convert the original files again"
        )
    made = asdict(Choice()) | content.meta.get("choice", {})
    for name, value in asdict(choice).items():
        if name == "label_key" and value == "classes" and content.meta["format"] != "mmsa":
            continue  # there is one set of labels, whatever they are
        if name != "modalities" and value != getattr(Choice(), name) and made[name] != value:
            dataset.report.notes.append(
                f"the store was made with {name} {made[name]}, not {value}: convert the original files again"
            )
    if training and held_back(content.splits["test"]):
        dataset.report.notes.append(
            "the test split has no labels: it is predicted, and the run is evaluated on the valid split only"
        )
    for line in dataset.report.lines():
        warnings.warn(printable(f"{path}: {line}"), DataWarning, stacklevel=2)
    return dataset
