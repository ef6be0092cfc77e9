import numpy as np
import pytest

from engine.demo.sentences import (
    DEGREES,
    EMPHASES,
    EXTREME,
    GRADABLE,
    LEVELS,
    MAX_WORDS,
    MIN_WORDS,
    NEGATING,
    PLAIN,
    Opinion,
    make_sentence,
    nearest_level,
)


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    values = 1.5 * rng.standard_normal(2400)
    lengths = np.clip(np.round(12 + 6 * rng.standard_normal(2400)), 4, 30).astype(int)
    sentences = [make_sentence(v, n, int(rng.integers(8)), rng) for v, n in zip(values, lengths, strict=True)]
    return values, lengths, sentences


def test_negation_flips_the_sign():
    for polarity in (1, -1):
        for strength in (1, 2):
            plain = Opinion(polarity, strength, 1.0, PLAIN[0]).value
            assert plain == polarity * strength
            for frame in NEGATING:
                assert np.sign(Opinion(polarity, strength, 1.0, frame).value) == -np.sign(plain)


def test_intensity_scales_the_value():
    for strength, modifiers in ((1, DEGREES), (2, EMPHASES)):
        values = [Opinion(1, strength, factor, PLAIN[0]).value for factor, _ in modifiers]
        assert values == sorted(values) and values[0] < values[-1]
    assert Opinion(-1, 1, 0.25, PLAIN[0]).value == -0.25  # barely bad
    assert Opinion(1, 2, 1.5, PLAIN[0]).value == 3.0  # absolutely wonderful


def test_words_say_what_the_value_says():
    """Read the sentences back by rule, without looking at how they were made."""
    rng = np.random.default_rng(1)
    degree = {w: f for f, words in DEGREES + EMPHASES for w in words if w}
    polarity = {w: p * s for table, s in ((GRADABLE, 1), (EXTREME, 2)) for p, words in table.items() for w in words}
    strong = (" at all", " in the least", " anything but ", "nobody could call ", " never ")
    weak = (" not ", " hardly ")
    for value in LEVELS:
        for _ in range(60):
            sentence = make_sentence(value, 4, 0, rng)
            text = f" {sentence.text} "
            if value == 0:
                continue
            word = next(w for w in text.split() if w in polarity)
            factor = next(
                (f for w, f in sorted(degree.items(), key=lambda i: -len(i[0])) if f" {w} {word}" in text), 1.0
            )
            frame = -1.0 if any(s in text for s in strong) else -0.5 if any(s in text for s in weak) else 1.0
            assert polarity[word] * factor * frame == sentence.value == value, sentence.text


def test_value_is_the_latent_quantised(corpus):
    values, _, sentences = corpus
    levels = np.array(LEVELS)
    for value, sentence in zip(values, sentences, strict=True):
        assert abs(sentence.value - value) <= np.abs(levels - value).min() + 1e-12
    assert nearest_level(9) == 3.0 and nearest_level(-9) == -3.0 and nearest_level(0.01) == 0.0


def test_lengths_and_vocabulary(corpus):
    _, lengths, sentences = corpus
    counts = np.array([len(s.text.split()) for s in sentences])
    assert counts.min() == MIN_WORDS and 24 <= counts.max() <= MAX_WORDS
    assert np.corrcoef(lengths, counts)[0, 1] > 0.85
    assert len({w for s in sentences for w in s.text.split()}) > 250
    assert len({s.text for s in sentences}) > 0.95 * len(sentences)
    assert not any("  " in s.text or s.text != s.text.strip() or "{" in s.text for s in sentences)


def test_negation_and_hearsay_are_common(corpus):
    *_, sentences = corpus
    assert 0.2 < np.mean([s.negated for s in sentences]) < 0.45
    assert 0.03 < np.mean([s.hearsay for s in sentences]) < 0.2


def test_bag_of_words_misses_the_meaning(corpus):
    """Ridge on TF-IDF explains under half of the variance; features that read the grammar explain all of it."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV

    *_, sentences = corpus
    y = np.array([s.value for s in sentences])
    train, test = slice(0, 1800), slice(1800, None)
    texts = [s.text for s in sentences]
    bag = TfidfVectorizer(token_pattern=r"\w+").fit(texts[train])
    ridge = RidgeCV(np.logspace(-2, 2, 9)).fit(bag.transform(texts[train]).toarray(), y[train])
    mae = np.abs(ridge.predict(bag.transform(texts[test]).toarray()) - y[test]).mean()
    constant = np.abs(np.median(y[train]) - y[test]).mean()
    assert constant > 1.0
    assert mae > 0.6 * constant  # the words' order holds most of it
    assert mae < 0.97 * constant  # yet the words are not noise
