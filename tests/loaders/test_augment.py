"""Augmentation: rates, what a missing modality becomes, and that draws depend on nothing but seed, epoch and sample."""

from dataclasses import replace

import pytest
import torch

from engine.config import AugmentConfig, DataConfig
from engine.errors import ConfigError
from engine.loaders import open_dataset
from engine.loaders.augment import Augmentation, _key, _mix
from engine.loaders.batch import Batch
from tests.loaders import writers
from tests.loaders.test_loaders import KINDS, of, same
from tests.loaders.test_text import small_tokenizer

EMPTY, UNKNOWN, PAD = (2, 3), 0, 1
FULL = AugmentConfig(drop_text=0.3, drop_audio=0.4, drop_vision=0.5, mask_text=0.2, mask_audio=0.3, mask_vision=0.1)


def batch(count=2000, length=9, features=False):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 15, (count, length), generator=generator)
    ids[:, 0], ids[:, -3] = EMPTY
    ids[:, -2:] = PAD
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[:, -2:] = 0
    frames = torch.randn(count, 6, 3, generator=generator)
    lengths = torch.full((count,), 6)
    return Batch(
        torch.arange(count), [str(i) for i in range(count)], torch.zeros(count, 1),
        None if features else ids, mask, torch.randn(count, length, 4, generator=generator) if features else None,
        frames, lengths, frames.clone(), lengths.clone(),
    )  # fmt: skip


def augmented(config, data, epoch=0, seed=0):
    augmentation = Augmentation(config, seed, EMPTY, UNKNOWN, PAD)
    return augmentation.apply(data, augmentation.keys(epoch))


def missing(found):
    """bool [B, 3]: text, audio, vision."""
    return torch.stack([found.token_mask.sum(1) == 2, found.audio_length == 1, found.vision_length == 1], 1)


def test_a_missing_modality_is_what_the_store_makes_of_one():
    data = batch()
    found = augmented(AugmentConfig(drop_text=0.3, drop_audio=0.4, drop_vision=0.5), data)
    gone = missing(found)
    for i, rate in enumerate((0.3, 0.4, 0.5)):
        # of all three at once, one is spared
        assert abs(gone[:, i].float().mean() - rate * (1 - 0.3 * 0.4 * 0.5 / rate / 3)) < 0.04
    assert not gone.all(1).any()
    text, audio, vision = gone.T
    assert not found.audio[audio].any() and not found.vision[vision].any()
    assert found.token_ids[text].tolist() == [[*EMPTY, *[PAD] * 7]] * int(text.sum())
    assert found.token_mask[text].tolist() == [[1, 1, *[0] * 7]] * int(text.sum())
    for name, kept in (("audio", ~audio), ("vision", ~vision), ("token_ids", ~text), ("token_mask", ~text)):
        assert torch.equal(getattr(found, name)[kept], getattr(data, name)[kept])
    assert found.audio.shape == data.audio.shape and found.audio_length[~audio].eq(6).all()
    same(data, batch())  # unchanged itself


def test_what_is_spared_is_drawn_evenly():
    gone = missing(augmented(AugmentConfig(drop_text=0.999, drop_audio=0.999, drop_vision=0.999), batch(3000)))
    assert (gone.sum(1) == 2).float().mean() > 0.98
    assert all(abs(share - 2 / 3) < 0.04 for share in gone.float().mean(0).tolist())


def test_masking_keeps_lengths_and_special_tokens():
    data = batch()
    found = augmented(AugmentConfig(mask_text=0.2, mask_audio=0.3, mask_vision=0.1), data)
    assert torch.equal(found.token_mask, data.token_mask)
    assert torch.equal(found.audio_length, data.audio_length)
    changed = found.token_ids != data.token_ids
    words = (data.token_ids >= 4) & (data.token_mask != 0)
    assert not (changed & ~words).any()
    assert (found.token_ids[changed] == UNKNOWN).all()
    assert abs(changed[words].float().mean() - 0.2) < 0.02
    for name, rate in (("audio", 0.3), ("vision", 0.1)):
        zero = ~getattr(found, name).any(-1)
        assert abs(zero.float().mean() - rate) < 0.02
        assert torch.equal(getattr(found, name)[~zero], getattr(data, name)[~zero])
    both = (~found.audio.any(-1) & ~found.vision.any(-1)).float().mean()
    assert abs(both - 0.03) < 0.01  # independent of each other


def test_text_features():
    data = batch(features=True)
    found = augmented(AugmentConfig(drop_text=0.4, mask_text=0.25), data)
    gone = found.token_mask.sum(1) == 1
    assert abs(gone.float().mean() - 0.4) < 0.04
    assert not found.text[gone].any()
    zero = ~found.text[~gone].any(-1)
    assert abs(zero.float().mean() - 0.25) < 0.02
    assert found.token_ids is None


def test_draws_depend_on_seed_epoch_and_sample_alone():
    data = batch(200)
    whole = augmented(FULL, data, epoch=3, seed=7)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:60]
    some = augmented(FULL, _rows(data, rows), epoch=3, seed=7)
    same(some, _rows(whole, rows))
    again = augmented(FULL, data, epoch=3, seed=7)
    same(again, whole)
    for other in (augmented(FULL, data, epoch=4, seed=7), augmented(FULL, data, epoch=3, seed=8)):
        assert not torch.equal(other.audio, whole.audio)
        agree = (missing(other) == missing(whole)).float().mean()
        assert 0.4 < agree < 0.65  # as unrelated draws of these rates do


def _rows(data, rows):
    taken = {k: v[rows] for k, v in vars(data).items() if isinstance(v, torch.Tensor)}
    return replace(data, ids=[data.ids[i] for i in rows.tolist()], **taken)


# splitmix64 in Python's integers, and the first numbers that it gives from 0 (Steele, Lea and Flood 2014)
GOLDEN, WORD = 0x9E3779B97F4A7C15, 1 << 64
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def mixed(state):
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB % WORD
    return state ^ state >> 31


def key(*numbers):
    state = 0
    for number in numbers:
        state = mixed((state + (number + 1) * GOLDEN) % WORD)
    return state


def test_the_generator_is_splitmix64():
    assert [mixed(n * GOLDEN % WORD) for n in (1, 2, 3)] == SPLITMIX
    states = torch.tensor([n * GOLDEN % WORD - (n * GOLDEN % WORD >> 63) * WORD for n in (1, 2, 3)])
    assert [value % WORD for value in _mix(states).tolist()] == SPLITMIX
    assert _key(0) % WORD == SPLITMIX[0] and _key(7, 3, 1) % WORD == key(7, 3, 1)


def test_draws_stay_what_they_are():
    """A run that is repeated with a later version meets the same batches."""
    rates, count = (0.6, 0.7, 0.8), 60
    config = AugmentConfig(drop_text=rates[0], drop_audio=rates[1], drop_vision=rates[2])
    bits = [[mixed(mixed((i * GOLDEN + key(7, 3, stream)) % WORD)) for i in range(count)] for stream in range(7)]
    expected = [[bits[m][i] % 2**63 < rates[m] * 2**63 for m in range(3)] for i in range(count)]
    for i, row in enumerate(expected):
        if all(row):
            row[(bits[6][i] >> 1) % 2**30 % 3] = False
    assert missing(augmented(config, batch(count), epoch=3, seed=7)).tolist() == expected
    masked = ~augmented(AugmentConfig(mask_vision=0.3), batch(count), epoch=3, seed=7).vision.any(-1)
    assert masked.tolist() == [
        [mixed((bits[5][i] + place * GOLDEN) % WORD) % 2**63 < 0.3 * 2**63 for place in range(6)] for i in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_and_shards(tmp_path, kind):
    path = writers.dump(writers.mmsa(writers.samples(sizes={"train": 23, "valid": 3, "test": 3})), tmp_path / "x.pkl")
    opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    plain = next(iter(opened.loader("train", 23, kind="resident")))
    loader = opened.loader("train", 23, seed=5, augment=FULL, **of(kind))
    first, second = [], []
    for epoch, kept in ((0, first), (1, second)):
        loader.set_epoch(epoch)
        kept += list(loader)
    expected = opened.loader("train", 23, seed=5, kind="resident", augment=FULL)
    same(first[0], next(iter(expected)))
    assert not torch.equal(first[0].audio, plain.audio) and not torch.equal(first[0].audio, second[0].audio)
    sharing = {"seed": 5, "augment": FULL, **of(kind)}
    one, other = (next(iter(opened.loader("train", 12, shard=(rank, 2), **sharing))) for rank in (0, 1))
    for part in (one, other):
        width = part.audio.shape[1]
        assert torch.equal(part.audio, first[0].audio[part.index, :width])
        assert torch.equal(part.audio_length, first[0].audio_length[part.index])


def test_off_by_default_and_rates_are_chances(tmp_path):
    path = writers.dump(writers.mmsa(writers.samples()), tmp_path / "x.pkl")
    opened = open_dataset(path, DataConfig(), str(small_tokenizer(tmp_path / "encoder")))
    assert opened.loader("train", 4, augment=AugmentConfig()).augmentation is None
    with pytest.raises(ConfigError, match=r"drop_audio"):
        AugmentConfig().drop_audio = 1.5
