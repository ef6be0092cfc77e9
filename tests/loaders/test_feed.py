"""Static batches: the same samples as the loaders give, in few shapes."""

import numpy as np
import pytest
import torch

from engine.config import AugmentConfig
from engine.errors import ConfigError
from engine.loaders import open_dataset
from engine.loaders.feed import Buckets, CopyFeed, ResidentFeed, buckets_of
from engine.training.passes import Passes
from tests.loaders import writers

SIZES = {"train": 29, "valid": 4, "test": 4}
TENSORS = ("index", "label", "token_ids", "token_mask", "audio", "audio_length", "vision", "vision_length")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from engine.config import DataConfig

    folder = tmp_path_factory.mktemp("data")
    writers.write_declarelab(folder, writers.samples(sizes=SIZES))
    return open_dataset(str(folder), DataConfig(time_len=9), "minilm")


def passes(dataset, exact=False, **settings):
    loader = dataset.loader("train", 8, shuffle=True, seed=3, drop_singleton=True, **settings)
    return Passes(loader, torch.device("cpu"), lambda batch: batch, exact)


def static_batches(feed):
    number = torch.zeros(1, dtype=torch.int64)
    for key in feed.steps():
        yield key, feed.batch(key, number)[0]
        number += 1


def narrow(tensor, like):
    return tensor[:, : like.shape[1]] if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("kind", ["resident", "copied"])
@pytest.mark.parametrize(
    "augment", [None, AugmentConfig(drop_text=0.3, drop_audio=0.3, mask_vision=0.5)], ids=["", "a"]
)
@pytest.mark.parametrize("max_padding", [None, 0.3])
def test_a_feed_gives_the_loaders_batches_padded_to_buckets(dataset, kind, augment, max_padding):
    settings = {"augment": augment, "max_padding": max_padding, "kind": "resident"}
    plain, static = passes(dataset, **settings), passes(dataset, exact=True, **settings)
    feed = static.feed() if kind == "resident" else CopyFeed(static._plain, torch.device("cpu"), None, exact=True)
    assert isinstance(feed, ResidentFeed if kind == "resident" else CopyFeed)
    for epoch in range(2):
        plain.set_epoch(epoch)
        static.set_epoch(epoch)
        for _ in range(2):
            sizes = static.batch_sizes()
            pairs = list(zip(plain, static_batches(feed), strict=True))
            for expected, (key, batch) in pairs:
                assert key[0] == len(expected) == len(batch) and batch.static
                for name in TENSORS:
                    want, found = getattr(expected, name), getattr(batch, name)
                    assert torch.equal(narrow(found, want), want), name
                    if found.ndim > 1 and name != "token_ids":
                        assert not found[:, want.shape[1] :].any(), name
                assert batch.audio_width == expected.audio.shape[1]
                assert batch.vision_width == expected.vision.shape[1]
            assert [len(expected) for expected, _ in pairs] == sizes


def test_a_feed_has_few_shapes(dataset):
    feed = passes(dataset).feed()
    shapes = {
        (key, batch.audio.shape, batch.vision.shape, batch.token_ids.shape) for key, batch in static_batches(feed)
    }
    assert len({key for key, *_ in shapes}) == len(shapes) <= 2 * len(buckets_of(passes(dataset).loader))


def test_a_loader_that_is_not_resident_is_copied(dataset):
    feed = passes(dataset, kind="torch").feed()
    assert isinstance(feed, CopyFeed)
    resident = list(static_batches(passes(dataset).feed()))
    for (key, batch), (other, expected) in zip(static_batches(feed), resident, strict=True):
        assert key == other
        assert all(torch.equal(getattr(batch, n), getattr(expected, n)) for n in TENSORS if n != "token_ids")


def test_buckets_hold_what_occurs_and_refuse_what_does_not():
    longest = np.array([[3, 20], [5, 30], [9, 41], [12, 45]])
    buckets = Buckets(longest, np.array([13, 50]))
    assert len(buckets) <= 4 and buckets.levels[-1].tolist() == [13, 50]
    for row in [*longest.tolist(), [1, 1], [13, 50], [13, 1]]:
        chosen = buckets.levels[buckets.of(row)]
        assert (np.array(row) <= chosen).all()
    assert buckets.of_each(longest) == [buckets.of(row) for row in longest]
    with pytest.raises(ConfigError, match=r"\[14, 2\] positions.*\[13, 50\]"):
        buckets.of([14, 2])
    with pytest.raises(ConfigError, match=r"\[2, 51\] positions.*\[13, 50\]"):
        buckets.of_each(np.array([[1, 1], [2, 51]]))
