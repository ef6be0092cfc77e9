"""Generated data with the lengths of the field's data sets: for benchmarks, and for users without access to them.

MOSI-shaped: words ~ clip(Gamma(2.2, 5.5), 1, 80); audio frames = 9·words·U(.6, 1.4) cut to 4..375, 5 features; vision
frames = 11·words·U(.6, 1.4) cut to 4..500, 20 features; labels clip(N(0, 1.6), -3, 3).
MOSEI-shaped: words ~ clip(Gamma(2.2, 9), 1, 200), 74 and 35 features, at most 500 frames of either.
AVEC-shaped: interviews of 20 to 100 steps, one word per step, mfcc (39) and action units (49) with one row per step,
labels in [0, 1] (PHQ-8 / 25).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Common words. In the usual WordPiece vocabularies most have one piece, some two or three. So a sentence of w words has
# about 1.1 w tokens, as transcribed speech has.
WORDS = """
i you it he she we they the a and but so this that was is are were be been have had do did would could should will can
not really very just about like know think feel thought liked loved hated enjoyed movie film story plot actors acting
character characters scene scenes music director ending beginning kind sort good great bad terrible awful amazing
boring funny sad interesting predictable better best worse worst pretty much more most some any all many because when
where what who how why if then than there here out up down over again first last one two three time people way thing
things lot little bit whole part end year years kids family friend friends see saw watch watched go went get got make
made say said um uh okay yeah well actually basically honestly definitely probably absolutely underwhelming storyline
cinematography heartwarming cringeworthy rewatchable overacted melodramatic nitpicking cliched screenplay storytelling
misogynistic
""".split()


@dataclass(frozen=True)
class Shape:
    """Distribution of lengths, and widths, of one data set (see the module's text)."""

    name: str
    words_scale: float
    words_max: int
    audio_dim: int
    vision_dim: int
    audio_max: int
    vision_max: int


MOSI = Shape("mosi", 5.5, 80, 5, 20, 375, 500)
MOSEI = Shape("mosei", 9.0, 200, 74, 35, 500, 500)


@dataclass
class Utterances:
    """N samples.

    Attributes:
        text: N transcripts; words int64 [N], their lengths.
        audio, vision: N float32 arrays [frames, features].
        label: float32 [N, 1].
    """

    text: list[str]
    words: np.ndarray
    audio: list[np.ndarray]
    vision: list[np.ndarray]
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    @property
    def audio_dim(self) -> int:
        return self.audio[0].shape[1]

    @property
    def vision_dim(self) -> int:
        return self.vision[0].shape[1]

    def part(self, start: int, stop: int) -> Utterances:
        """Samples `start` to `stop`."""
        rows = slice(start, stop)
        return Utterances(self.text[rows], self.words[rows], self.audio[rows], self.vision[rows], self.label[rows])


def utterances(shape: Shape, n: int, seed: int = 0) -> Utterances:
    """`n` samples of a shape. Equal seeds give equal data.

    >>> len(utterances(MOSI, 3).audio)
    3
    """
    rng = np.random.default_rng(seed)
    words = np.clip(rng.gamma(2.2, shape.words_scale, n).round(), 1, shape.words_max).astype(np.int64)
    audio = _frames(9 * words * rng.uniform(0.6, 1.4, n), shape.audio_max, shape.audio_dim, rng)
    vision = _frames(11 * words * rng.uniform(0.6, 1.4, n), shape.vision_max, shape.vision_dim, rng)
    label = np.clip(rng.normal(0, 1.6, (n, 1)), -3, 3).astype(np.float32)
    return Utterances(_sentences(words, rng), words, audio, vision, label)


def mosi(n: int, seed: int = 0) -> Utterances:
    """MOSI-shaped."""
    return utterances(MOSI, n, seed)


def mosei(n: int, seed: int = 0) -> Utterances:
    """MOSEI-shaped."""
    return utterances(MOSEI, n, seed)


def avec(n: int, seed: int = 0) -> Utterances:
    """AVEC2019-shaped."""
    rng = np.random.default_rng(seed)
    words = np.clip(rng.normal(85, 30, n).round(), 20, 100).astype(np.int64)
    audio, vision = _frames(words, 100, 39, rng), _frames(words, 100, 49, rng)
    label = (np.clip(rng.gamma(1.4, 4.5, (n, 1)), 0, 24) / 25).astype(np.float32)
    return Utterances(_sentences(words, rng), words, audio, vision, label)


def _frames(lengths: np.ndarray, most: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    lengths = np.clip(np.asarray(lengths).round(), 4, most).astype(np.int64)
    values = rng.standard_normal((int(lengths.sum()), width), dtype=np.float32)
    return np.split(values, np.cumsum(lengths)[:-1])


def _sentences(words: np.ndarray, rng: np.random.Generator) -> list[str]:
    drawn = rng.integers(len(WORDS), size=int(words.sum()))
    return [" ".join(WORDS[i] for i in piece) for piece in np.split(drawn, np.cumsum(words)[:-1])]
