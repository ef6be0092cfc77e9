"""From a path to normalised batches. A trainer needs nothing else of this package."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from engine.config import AugmentConfig, DataConfig
from engine.errors import ConfigError, printable
from engine.loaders.augment import Augmentation
from engine.loaders.cache import load_content
from engine.loaders.choice import Kind, build, choose
from engine.loaders.content import StoreData, require_modalities, require_text, tokenised
from engine.loaders.formats import Choice
from engine.loaders.loader import Loader, Padding
from engine.loaders.normalize import Normalizer
from engine.loaders.problems import held_back, training_problems
from engine.loaders.sampler import Lengths, Sampler, torchrun_shard
from engine.loaders.split import Split
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer
from engine.vocabulary import ModelTask

UNKNOWN_SHARE = 0.1  # of tokens: with more, the text encoder is hardly the right one
UNREAD_SHARE = 0.05  # of tokens beyond data.time_len: a warning says so. MOSI has 2 % at the usual 40

log = logging.getLogger("engine")


class DataWarning(UserWarning):
    """Something in the data that is handled, but that the user should know."""


@dataclass
class DataReport:
    """What was met while the data was read.

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
        """Sentences for the user; none if there is nothing to say."""
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


def _beyond(data: StoreData, most: int) -> list[str]:
    """Notes on the frames that are cut off after the first `most`."""
    notes = []
    for key in ("audio", "vision"):
        lost = {n: int(np.maximum(getattr(s, key).lengths - most, 0).sum()) for n, s in data.splits.items()}
        lost = {name: count for name, count in lost.items() if count}
        if lost:
            notes.append(f"{key}: {sum(lost.values())} frames beyond data.time_len={most} left out ({_listed(lost)})")
    return notes


def _long_texts(splits: dict[str, Split], most: int) -> list[str]:
    """A note on the tokens, or rows of text features, that batches leave out after the first `most`.

    A few of them are usual, and are counted in the log only.
    """
    lost, texts = {}, 0
    for name, split in splits.items():
        rows = split.features if split.tokens is None else split.tokens
        over = np.maximum(rows.lengths - most, 0)
        if over.any():
            lost[name], texts = int(over.sum()), texts + int(np.count_nonzero(over))
    if not lost:
        return []
    total = sum(int((s.features if s.tokens is None else s.tokens).lengths.sum()) for s in splits.values())
    what = "tokens" if next(iter(splits.values())).tokens is not None else "rows of text features"
    note = (
        f"text: {sum(lost.values())} {what} beyond data.time_len={most} left out, of {texts} texts "
        f"({_listed(lost)}; {100 * sum(lost.values()) / total:.1f} % of all)"
    )
    if sum(lost.values()) < UNREAD_SHARE * total:
        log.info("%s", note)
        return []
    return [note]


class Dataset:
    """An open data set.

    Attributes:
        splits: those of "train", "valid" and "test" that there are -> Split.
        audio_dim, vision_dim, text_dim: feature columns; 0 for a modality that is not in data.modalities. text_dim is 0
            unless text features are precomputed.
        tokenizer: made the tokens of the texts; None without tokens.
        normalizer: the statistics in use.
        report: what was replaced or missing.
        columns: modality -> names of its feature columns, if the files name them.
        pad_id, closing_id, time_len: of the tokens in batches.
    """

    def __init__(self, data: StoreData, config: DataConfig, tokenizer: Tokenizer | None, normalizer: Normalizer | None):
        meta, modalities = data.meta, config.modalities
        tokenizer = tokenizer if "text" in modalities else None
        data = StoreData(meta, {name: split.only(modalities) for name, split in data.splits.items()})
        self.time_len, self.tokenizer = config.time_len, tokenizer
        # prediction has no training split, but statistics; any split has the widths
        train = data.splits.get("train") or next(iter(data.splits.values()))
        train.check()
        self.normalizer = normalizer or Normalizer.fit(train, config)
        fitted = self.normalizer.notes(train) if normalizer is None else []
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
        self._content, self.columns = data, meta.get("columns", {})
        counts, counted = meta["counts"], (*modalities, *(["features"] if "text" in modalities else []))
        self.report = DataReport(
            meta["format"],
            meta["source"],
            meta["length_rule"],
            *(
                {name: {m: n for m, n in c[kind].items() if m in counted} for name, c in counts.items()}
                for kind in ("nonfinite", "missing")
            ),
            list(meta["notes"])
            + fitted
            + (_beyond(data, config.time_len) if meta.get("cut") else [])
            + (_long_texts(self.splits, config.time_len) if tokenizer or precomputed else []),
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
        task: ModelTask = "regression",
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
            seed: together with the epoch, it decides the shuffled order.
            pad_tokens_to: width of the token tensor; None pads to the longest of the batch.
            drop_last: leave out a last batch that is short. drop_singleton: leave out a last batch of one sample.
            task: classification gives int64 labels [B].
            draw_words: some data (AVEC2019) gives one word per sentence to the text encoder. True draws them anew in
                every epoch, as training does; False takes the fixed draw of evaluation.
            device: where the batches' tensors are.
            kind: auto decides by memory. Every kind gives the same batches.
            workers: processes of the torch loader, or threads of the DALI loader; None lets it choose.
            max_padding: see `Sampler`.
            shard: (rank, world size) of this process, or "torchrun" to take it from the environment.
            augment: random changes of the samples, which depend on `seed` and epoch. None: no changes.

        Raises:
            DataError: task is classification and a label is not a class number.
            ConfigError: there is no such split, task or kind, a number is out of range, kind is dali and DALI is not
                installed, or the environment is not torchrun's.
        """
        for name, value, known in (("split", split, list(self.splits)), ("task", task, get_args(ModelTask))):
            if value not in known:
                raise ConfigError(name, f"{value!r}"[:60], f"one of {', '.join(known)}", "Choose one of these.")
        count = isinstance(workers, (int, np.integer)) and not isinstance(workers, bool) and workers >= 0
        if workers is not None and not count:
            raise ConfigError("workers", f"{workers!r}"[:60], "0 or more processes, or None", "Change the value.")
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
            chosen, data, sampler, padding, device=device, draw_words=draw_words, task=task, why=why,
            workers=None if workers is None else int(workers), augmentation=augmentation,
        )  # fmt: skip


def _as_trained(data: StoreData, normalizer: Normalizer) -> StoreData:
    """The same data. A modality that all samples of a split lack gets the width that it had in training."""
    splits = {}
    for name, split in data.splits.items():
        missing = data.meta["counts"][name]["missing"]
        gone = [m for m in ("audio", "vision") if missing.get(m) == len(split)]
        splits[name] = split.widened({m: getattr(normalizer, m).dim for m in gone})
    return StoreData(data.meta, splits)


def choice_of(data: DataConfig) -> Choice:
    """What the settings say to take if the data has several of a kind."""
    return Choice(
        data.audio_features, data.vision_features, data.text_features, data.label_column, data.align, data.label_key,
        tuple(data.modalities), data.pool_audio, data.pool_vision, tuple(data.skip_columns),
    )  # fmt: skip


def open_dataset(
    path: str | Path,
    data: DataConfig,
    text_encoder: str | Path = "minilm",
    normalizer: Normalizer | None = None,
    expected: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    training: bool = True,
) -> Dataset:
    """Open a data set for training, evaluation or prediction.

    Foreign formats are converted on first use. The store is kept beside the source, or in the user's cache folder if
    that place cannot be written to. A DataWarning says once what was replaced or is missing.

    Args:
        path: a file or folder of any format, or a store.
        data: settings; modalities, length rule, normalisation and time_len are used.
        text_encoder: the encoder whose tokeniser is applied; `features` takes precomputed text features.
        normalizer: statistics to use; None fits them on this data's training split.
        expected: name of the format that the user says it is.
        tokenizer: is used instead of that of `text_encoder`.
        training: False opens data that is only predicted. One split will do, labels may be missing (NaN), and
            `normalizer` must be given.

    Raises:
        DataError: the data cannot be used.
    """
    text_encoder = str(text_encoder)
    if text_encoder == PRECOMPUTED or "text" not in data.modalities:
        tokenizer = None
    elif tokenizer is None:
        tokenizer = load_tokenizer(text_encoder)
    expected = expected or (None if data.format == "auto" else data.format)
    choice = choice_of(data)
    content = load_content(path, data.length_rule, tokenizer, expected, choice, training)
    require_modalities(content, data.modalities, str(path))
    if "text" in data.modalities:
        require_text(content, tokenizer, str(path), text_encoder)
    errors = training_problems(content.splits, str(path)) if training else []
    if errors:
        raise errors[0]
    dataset = Dataset(content, data, tokenizer, normalizer)
    dataset.report.notes += _differences(content.meta, data.length_rule, choice)
    if training and held_back(content.splits["test"]):
        dataset.report.notes.append(
            "the test split has no labels: it is predicted, and the run is evaluated on the valid split only"
        )
    for line in dataset.report.lines():
        warnings.warn(printable(f"{path}: {line}"), DataWarning, stacklevel=2)
    return dataset


def _differences(meta: dict[str, Any], length_rule: str, choice: Choice) -> list[str]:
    """Notes on settings that a store was not made with."""
    again, notes, rule = "convert the original files again", [], meta["length_rule"]
    if length_rule not in (rule, "auto"):
        notes.append(f"the store was made by length rule {rule}, not {length_rule}: {again}")
    made = asdict(Choice()) | meta.get("choice", {})
    for name, value in asdict(choice).items():
        if name == "label_key" and value == "classes" and meta["format"] != "mmsa":
            continue  # other formats have one set of labels
        value, before = (list(v) if isinstance(v, tuple) else v for v in (value, made[name]))
        if name != "modalities" and value not in (getattr(Choice(), name), []) and before != value:
            notes.append(f"the store was made with {name} {made[name]}, not {value}: {again}")
    return notes
