"""English sentences whose sentiment is known, and hangs on negation and intensity.

An opinion is (adjective, modifier, frame). The adjective has a polarity and a strength, the modifier multiplies it
("barely" by .25, "very" by 1.5, "absolutely" an extreme word by 1.5), and the frame multiplies it once more: a plain
frame by 1, a negating one by a negative number ("not bad at all": -1 x -1 = +1). The product is its sentiment, one of
LEVELS. Most of what can be said with a negation is, so that words without their order say little.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

MIN_WORDS, MAX_WORDS = 4, 30
NEGATED_SHARE = 0.6  # of the sentences whose level can be said with a negating frame
HEARSAY_SHARE = 0.25  # of the longer sentences report somebody else's opinion, which does not count

_words = str.split

# adjective strength 1 takes degrees; strength 2 is extreme and takes emphasis
GRADABLE = {
    1: _words(
        "good nice pleasant enjoyable funny clever charming warm fresh engaging smart lively likable moving gentle "
        "bright helpful useful polished thoughtful elegant exciting convincing friendly graceful"
    ),
    -1: _words(
        "bad dull weak boring clumsy silly cold stale slow messy annoying flat poor tedious shallow noisy confusing "
        "ugly lazy awkward bland rude careless tiresome disappointing"
    ),
}
EXTREME = {
    1: _words("wonderful brilliant superb fantastic stunning magnificent marvelous delightful excellent outstanding"),
    -1: _words("terrible awful horrible dreadful atrocious miserable disgusting appalling unbearable disastrous"),
}
NEUTRAL = [
    "average",
    "ordinary",
    "typical",
    "unremarkable",
    "so so",
    "neither good nor bad",
    "neither great nor terrible",
]

# (words before the adjective, factor); several words mean the same degree
DEGREES = [
    (0.25, ["barely", "only just", "marginally"]),
    (0.5, ["slightly", "somewhat", "a little", "a bit"]),
    (0.75, ["fairly", "rather", "moderately"]),
    (1.0, [""]),
    (1.5, ["very", "really", "so"]),
    (2.0, ["extremely", "incredibly", "remarkably"]),
]
EMPHASES = [
    (0.75, ["almost", "nearly"]),
    (1.0, [""]),
    (1.25, ["truly", "simply"]),
    (1.5, ["absolutely", "utterly", "completely"]),
]


@dataclass(frozen=True)
class Frame:
    """How an opinion is said. `{s}` stands for the subject, `{x}` for modifier and adjective."""

    text: str
    factor: float


PLAIN = [
    Frame("{s} was {x}", 1.0),
    Frame("I found {s} {x}", 1.0),
    Frame("I thought {s} was {x}", 1.0),
    Frame("{s} turned out {x}", 1.0),
    Frame("for me {s} felt {x}", 1.0),
]
NEGATING = [
    Frame("{s} was not {x}", -0.5),
    Frame("I would not call {s} {x}", -0.5),
    Frame("I did not think {s} was {x}", -0.5),
    Frame("{s} was hardly {x}", -0.5),
    Frame("{s} was not {x} at all", -1.0),
    Frame("{s} was not {x} in the least", -1.0),
    Frame("{s} was anything but {x}", -1.0),
    Frame("nobody could call {s} {x}", -1.0),
    Frame("{s} was never {x} for a moment", -1.0),
]

# what is talked about: the topic latent picks a row
TOPICS = {
    "film": (
        "movie plot acting script ending soundtrack dialogue camera cast",
        "in the cinema",
        "the theater was half full",
    ),
    "food": (
        "meal soup dessert menu kitchen bread sauce breakfast dinner",
        "at the restaurant",
        "we sat near the window",
    ),
    "hotel": ("room lobby pool view bed service garden staff terrace", "at the hotel", "we stayed for three nights"),
    "book": ("novel story chapter style prose hero narrator preface index", "in the book", "I read it on the train"),
    "music": (
        "concert singer melody rhythm album stage drummer chorus lighting",
        "at the show",
        "the band played two hours",
    ),
    "game": (
        "level puzzle design graphics combat tutorial interface map controller",
        "in the game",
        "I played it over a weekend",
    ),
    "phone": (
        "screen battery camera keyboard speaker case display software charger",
        "on the phone",
        "I bought it last month",
    ),
    "class": (
        "lecture teacher course lesson exam homework slides lab textbook",
        "at the college",
        "we met every Tuesday",
    ),
}
OPENERS = ["well", "you know", "I mean", "to be honest", "so yeah", "okay", "in the end", "look", "as I said", "um"]
NEUTRAL_CLAUSES = [
    "my sister came along with me",
    "it was raining outside that day",
    "we arrived around seven",
    "it took about an hour",
    "I had heard of it before",
    "the tickets came by mail",
    "my neighbor told me about it in spring",
    "they changed a few things since last year",
    "we talked about it on the way home",
    "I went there with two friends from work",
    "it starts with a long introduction",
    "there is another one coming next winter",
]
TAILS = ["by the way", "I guess", "in my view", "this time", "if you ask me", "from start to finish", "that evening"]
HEARSAY = [
    "my brother called it {x} but",
    "the critics said it was {x} but",
    "some people think it is {x} but",
    "a friend warned me it would be {x} but",
]


@dataclass(frozen=True)
class Opinion:
    """One way to say a sentiment."""

    polarity: int
    strength: int
    factor: float
    frame: Frame

    @property
    def value(self) -> float:
        """Sentiment in [-3, 3]: polarity x strength x modifier x frame."""
        return self.polarity * self.strength * self.factor * self.frame.factor

    @property
    def negated(self) -> bool:
        return self.frame.factor < 0


@cache
def _opinions() -> dict[float, dict[bool, list[Opinion]]]:
    """Every way to say every level, plain and negated apart."""
    table: dict[float, dict[bool, list[Opinion]]] = defaultdict(lambda: {False: [], True: []})
    for frame in PLAIN + NEGATING:
        for strength, modifiers in ((1, DEGREES), (2, EMPHASES)):
            for factor, _ in modifiers:
                # "not barely good" and "anything but absolutely awful" are no English
                if frame.factor < 0 and factor not in (
                    (1.0, 1.5) if frame.factor == -0.5 and strength == 1 else (1.0,)
                ):
                    continue
                for polarity in (1, -1):
                    opinion = Opinion(polarity, strength, factor, frame)
                    table[opinion.value][opinion.negated].append(opinion)
    return dict(table)


LEVELS: tuple[float, ...] = tuple(sorted([*_opinions(), 0.0]))


def nearest_level(value: float) -> float:
    """The level next to `value`; halfway goes up."""
    return LEVELS[bisect([(a + b) / 2 for a, b in pairwise(LEVELS)], value)]


@dataclass(frozen=True)
class Sentence:
    """A sentence and what it says.

    Attributes:
        text: 4 to 30 English words.
        value: its sentiment in [-3, 3], one of LEVELS, known from its making.
        negated: whether that sentiment is said with a negation.
        hearsay: whether it also reports somebody else's opinion.
    """

    text: str
    value: float
    negated: bool
    hearsay: bool


def make_sentence(value: float, words: int, topic: int, rng: np.random.Generator) -> Sentence:
    """A random sentence of about `words` words on topic number `topic` whose sentiment is the level nearest `value`."""
    level = nearest_level(value)
    nouns, place, aside = list(TOPICS.values())[topic % len(TOPICS)]
    core, negated = _core(level, "the " + _pick(nouns.split(), rng), rng)
    parts, hearsay = [core], False

    def room() -> int:
        return min(words, MAX_WORDS) - len(" ".join(parts).split())

    if room() >= 8 and rng.random() < HEARSAY_SHARE:
        parts.insert(
            0, _pick(HEARSAY, rng).format(x=_phrase(int(rng.choice([-1, 1])), int(rng.choice([1, 2])), 1.0, rng))
        )
        hearsay = True
    if room() >= 1 and rng.random() < 0.5:
        _insert_fitting(parts, 0, OPENERS, room(), rng)
    if room() >= 3 and rng.random() < 0.5:
        _insert_fitting(parts, len(parts), [place, *TAILS], room(), rng)
    clauses = [aside, *NEUTRAL_CLAUSES]
    while room() >= 6 and clauses:
        before = rng.random() < 0.5
        clause = clauses.pop(int(rng.integers(len(clauses))))
        if len(clause.split()) < room():
            parts.insert(*((0, clause + " and") if before else (len(parts), "and " + clause)))
    return Sentence(" ".join(parts), level, negated, hearsay)


def _core(level: float, subject: str, rng: np.random.Generator) -> tuple[str, bool]:
    if level == 0.0:
        return _pick(PLAIN, rng).text.format(s=subject, x=_pick(NEUTRAL, rng)), False
    ways = _opinions()[level]
    negated = bool(ways[True]) and rng.random() < NEGATED_SHARE
    opinion = _pick(ways[negated], rng)
    return (
        opinion.frame.text.format(s=subject, x=_phrase(opinion.polarity, opinion.strength, opinion.factor, rng)),
        negated,
    )


def _phrase(polarity: int, strength: int, factor: float, rng: np.random.Generator) -> str:
    adjectives, modifiers = (GRADABLE, DEGREES) if strength == 1 else (EXTREME, EMPHASES)
    return f"{_pick(dict(modifiers)[factor], rng)} {_pick(adjectives[polarity], rng)}".strip()


def _insert_fitting(parts: list[str], at: int, choices: list[str], room: int, rng: np.random.Generator) -> None:
    fitting = [c for c in choices if len(c.split()) <= room]
    if fitting:
        parts.insert(at, _pick(fitting, rng))


def _pick(items: list, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]
