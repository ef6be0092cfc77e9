"""The content of a data set between its files and its batches: splits that are not normalised yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from engine.config import MODALITIES
from engine.errors import DataError
from engine.loaders.ragged import Ragged, absent, zero_frames
from engine.loaders.text import Tokenizer


def _unchanged() -> None:
    """Arrays in memory do not change."""


@dataclass
class SplitData:
    """One split, not normalised, possibly memory-mapped.

    Attributes:
        ids, text: N names; N transcripts or None.
        label: float32 [N, 1]; NaN where a sample has none.
        audio, vision: float32 ragged [total, d]; a missing modality is one zero frame.
        tokens: int32 ragged or None. features: float32 ragged [total, d_t] or None.
        check: raises DataError if the file that the arrays are views of has changed since it was opened. Call it before
            they are read.
        reopen: opens the same split of its store again; None for arrays in memory.
        modalities: those that `only` has kept.
    """

    ids: list[str]
    text: list[str] | None
    label: np.ndarray
    audio: Ragged
    vision: Ragged
    tokens: Ragged | None = None
    features: Ragged | None = None
    check: Callable[[], None] = _unchanged
    reopen: Callable[[], SplitData] | None = None
    modalities: tuple[str, ...] = MODALITIES

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store itself. Tokens are sent: they may come from another tokeniser than its."""
        if self.reopen is not None:
            tokens = self.tokens and Ragged(np.array(self.tokens.values), np.array(self.tokens.offsets))
            dims = {m: getattr(self, m).dim for m in ("audio", "vision")}
            return _reopened, (self.reopen, tokens, self.modalities, dims)
        return SplitData, tuple(getattr(self, f.name) for f in fields(self))

    def widened(self, dims: Mapping[str, int]) -> SplitData:
        """This split with other widths for the modalities in `dims`, which no sample of it has."""
        wide = {m: zero_frames(len(self), dim) for m, dim in dims.items() if getattr(self, m).dim != dim}
        return replace(self, **wide) if wide else self

    def only(self, modalities: Sequence[str]) -> SplitData:
        """The same samples without the other modalities. One frame of one zero takes their place."""
        gone = [m for m in MODALITIES if m not in modalities]
        changes: dict[str, Any] = {m: absent(len(self)).ragged for m in gone if m != "text"}
        if "text" in gone:
            changes |= {"text": None, "tokens": None, "features": absent(len(self)).ragged}
        return replace(self, **changes, modalities=tuple(modalities)) if gone else self


def _reopened(
    reopen: Callable[[], SplitData], tokens: Ragged | None, modalities: tuple[str, ...], dims: dict[str, int]
) -> SplitData:
    return replace(reopen(), tokens=tokens).only(modalities).widened(dims)


def _packed(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [t.encode("utf-8", "replace") for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


@dataclass
class StoreData:
    """Splits by name, and what is known of them. `engine.loaders.store` describes `meta`."""

    meta: dict[str, Any]
    splits: Mapping[str, SplitData]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays that a store keeps, by `<split>/<name>`."""
        for name, split in self.splits.items():
            yield f"{name}/label", split.label
            packed = {"ids": _packed(split.ids)}
            if split.text is not None:
                packed["text"] = _packed(split.text)
            for key in ("audio", "vision", "tokens", "features"):
                ragged = getattr(split, key)
                if ragged is not None:
                    packed[key] = (ragged.values, ragged.offsets)
            for key, (values, offsets) in packed.items():
                yield f"{name}/{key}/values", values
                yield f"{name}/{key}/offsets", offsets

    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's ids, texts, labels and features, whatever file or folder they came from.

        Tokens count only where there are no texts from which they follow.
        """
        sums = self.meta.get("checksums")
        if not sums:  # not read from a store
            sums = {key: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for key, array in self.tensors()}
        fingerprints = {}
        for name, split in self.splits.items():
            own = {key: value for key, value in sums.items() if key.startswith(f"{name}/")}
            if split.text is not None:
                own = {key: value for key, value in own.items() if not key.startswith(f"{name}/tokens/")}
            fingerprints[name] = hashlib.sha256(json.dumps(sorted(own.items())).encode()).hexdigest()
        return fingerprints


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """What a store records of the tokeniser that made its tokens."""
    if tokenizer is None:
        return None
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "pad_id": tokenizer.pad_id,
        "closing_id": tokenizer.closing_id,
    }


def tokenised(data: StoreData, tokenizer: Tokenizer) -> StoreData:
    """The same data with the tokens of `tokenizer`. They are made anew only if another tokeniser made those it has.

    Raises:
        DataError: a token is outside the vocabulary, or the tokens are another vocabulary's and there are no texts.
    """
    made = data.meta.get("tokenizer") or {}
    if made.get("fingerprint") == tokenizer.fingerprint and all(s.tokens is not None for s in data.splits.values()):
        for name, split in data.splits.items():
            split.check()
            largest = int(split.tokens.values.max(initial=0))
            if largest >= tokenizer.size or int(split.tokens.values.min(initial=0)) < 0:
                raise DataError(
                    f"{name}/tokens", f"token {largest}", f"0 to {tokenizer.size - 1}, as {tokenizer.name} has them",
                    "Convert the original files again.",
                )  # fmt: skip
        return data
    for name, split in data.splits.items():
        if split.text is None:
            raise DataError(
                f"{name}/tokens", f"tokens of another vocabulary ({made.get('name', 'unknown')}) and no texts",
                f"those of {tokenizer.name}", "Convert the original files for this text encoder.",
            )  # fmt: skip
    draws = data.meta.get("draws_words", False)
    splits = {n: replace(s, tokens=tokenizer.encode(s.text or [], draws)) for n, s in data.splits.items()}
    return StoreData({**data.meta, "tokenizer": describe_tokenizer(tokenizer)}, splits)


def require_text(data: StoreData, tokenizer: Tokenizer | None, where: str, text_encoder: str) -> None:
    """Raise DataError unless every split has what the text encoder needs: transcripts, or precomputed features."""
    for name, split in data.splits.items():
        if tokenizer is None and split.features is None:
            raise DataError(
                f"{where}, {name}", "no precomputed text features", "text features, as text_encoder=features says",
                "Name a text encoder.",
            )  # fmt: skip
        if tokenizer is not None and split.text is None and split.tokens is None:
            raise DataError(
                f"{where}, {name}", "no texts", f"transcripts for the text encoder {text_encoder}",
                "Use text_encoder=features, or leave text out of data.modalities.",
            )  # fmt: skip


def require_modalities(data: StoreData, modalities: Sequence[str], where: str) -> None:
    """Raise DataError unless the data was read with all of `modalities`."""
    kept = data.meta.get("choice", {}).get("modalities", MODALITIES)
    lacking = [m for m in modalities if m not in kept]
    if lacking:
        raise DataError(
            where, f"a store of {' and '.join(kept)}", f"{' and '.join(lacking)} too, as data.modalities says",
            f"Set data.modalities=[{', '.join(kept)}], or convert the original files with all of them.",
        )  # fmt: skip
