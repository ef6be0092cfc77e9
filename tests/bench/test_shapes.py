"""Generated data: the stated distributions, the same samples for the same seed, and what both sides make of them."""

import numpy as np
import pytest

from bench import shapes


def test_mosi_shaped_lengths_and_widths():
    samples = shapes.mosi(4000, seed=0)
    # Gamma(2.2, 5.5) has mean 12.1 and standard deviation 8.2
    assert samples.words.mean() == pytest.approx(12.1, abs=0.5)
    assert samples.words.min() >= 1 and samples.words.max() <= 80
    assert [len(text.split()) for text in samples.text] == samples.words.tolist()
    for sequences, factor, most, width in ((samples.audio, 9, 375, 5), (samples.vision, 11, 500, 20)):
        lengths = np.array([len(s) for s in sequences])
        assert lengths.min() >= 4 and lengths.max() <= most
        expected = np.clip(factor * samples.words, 4, most)
        free = (lengths > 4) & (lengths < most)
        assert np.abs(lengths / expected - 1)[free].max() <= 0.45
        assert sequences[0].shape[1] == width and sequences[0].dtype == np.float32
    assert samples.label.shape == (4000, 1) and np.abs(samples.label).max() == 3
    assert samples.label.std() == pytest.approx(1.5, abs=0.1)


def test_mosei_and_avec_shaped():
    samples = shapes.mosei(600, seed=0)
    assert (samples.audio_dim, samples.vision_dim) == (74, 35)
    assert samples.words.mean() == pytest.approx(19.8, abs=1.5)
    assert max(map(len, samples.audio)) <= 500
    samples = shapes.avec(60, seed=0)
    assert (samples.audio_dim, samples.vision_dim) == (39, 49)
    assert [len(a) for a in samples.audio] == [len(v) for v in samples.vision] == samples.words.tolist()
    assert samples.label.min() >= 0 and samples.label.max() <= 1


def test_equal_seeds_give_equal_data_and_a_part_is_a_part():
    a, b, c = shapes.mosi(20, 1), shapes.mosi(20, 1), shapes.mosi(20, 2)
    assert a.text == b.text and all(np.array_equal(x, y) for x, y in zip(a.audio, b.audio, strict=True))
    assert a.text != c.text
    part = a.part(3, 7)
    assert len(part) == 4 and part.text == a.text[3:7] and np.array_equal(part.vision[0], a.vision[3])
