"""Resident, DALI and torch loaders: the same batches, every sample once, positions that can be taken up again."""

import importlib.util
import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.errors import CheckpointError, ConfigError, DataError
from engine.loaders import choice, open_dataset
from engine.loaders.sampler import Lengths, Sampler, epoch_order, torchrun_shard
from tests.loaders import writers
from tests.loaders.test_text import small_tokenizer

SIZES = {"train": 23, "valid": 3, "test": 4}
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed (it exists for Linux only): pip install 'engine[dali]'",
)
KINDS = ("resident", pytest.param("dali", marks=needs_dali), "torch", "torch in a process")
OTHERS = KINDS[1:]


def of(kind):
    """Arguments of `Dataset.loader`; on a CPU the torch loader has no workers of its own."""
    name = kind.removesuffix(" in a process")
    return {"kind": name, "workers": 1 if kind != name else None}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    data = writers.samples(sizes=SIZES)
    data["train"][3].vision[:] = 0
    data["train"][5].audio[0] = 0  # a zero frame inside
    return writers.dump(writers.mmsa(data, features=6), tmp_path_factory.mktemp("data") / "x.pkl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(small_tokenizer(tmp_path_factory.mktemp("encoder")))


def same(a, b):
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), field.name
        else:
            assert x == y, field.name


def epoch(loader, number):
    loader.set_epoch(number)
    return list(loader)


SETTINGS = {
    "zscore": DataConfig(time_len=6, clip=1.5),
    "plain": DataConfig(time_len=6, normalize_audio="none", normalize_vision="none"),
    "minmax, log": DataConfig(time_len=6, normalize_audio="minmax", log_vision=True),
    "float16": DataConfig(time_len=6, precision="float16"),
}


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_gives_the_same_batches(path, tokenizer, kind, name):
    options = {"shuffle": True, "seed": 3, "drop_singleton": True, "max_padding": 0.3}
    opened = open_dataset(path, SETTINGS[name], tokenizer)
    expected = opened.loader("train", 4, kind="resident", **options)
    found = opened.loader("train", 4, **of(kind), **options)
    assert found.kind == of(kind)["kind"]
    for number in (0, 1, 0):
        pairs = list(zip(epoch(found, number), epoch(expected, number), strict=True))
        assert len(pairs) == 6 == len(found)
        for a, b in pairs:
            same(a, b)


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("pad_to", [None, 4, 8])
def test_text_features_and_widths(path, tokenizer, kind, pad_to):
    for encoder in ("features", tokenizer):
        opened = open_dataset(path, DataConfig(time_len=6), encoder)
        pair = [list(opened.loader("valid", 2, pad_tokens_to=pad_to, **of(k))) for k in ("resident", kind)]
        for a, b in zip(*pair, strict=True):
            same(a, b)
            assert pad_to is None or a.token_mask.shape[1] == pad_to


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_left_early_leaves_nothing_behind(path, tokenizer, kind):
    opened = open_dataset(path, DataConfig(), tokenizer)
    loader = opened.loader("train", 4, shuffle=True, **of(kind))
    whole = epoch(loader, 0)
    assert len(list(itertools.islice(loader, 2))) == 2
    for a, b in zip(epoch(loader, 0), whole, strict=True):
        same(a, b)


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_position(path, tokenizer, kind):
    opened = open_dataset(path, DataConfig(), tokenizer)
    loader = opened.loader("train", 4, shuffle=True, **of(kind))
    whole = {number: epoch(loader, number) for number in (0, 1)}
    loader.set_epoch(1)
    list(itertools.islice(loader, 2))
    state = loader.state_dict()
    again = opened.loader("train", 4, shuffle=True, **of(kind))
    again.load_state_dict(state)
    again.set_epoch(1)  # the same epoch: the position stays
    rest = list(again)
    assert len(rest) == len(whole[1]) - 2
    for a, b in zip(rest, whole[1][2:], strict=True):
        same(a, b)
    assert again.state_dict()["batch"] == len(whole[1])
    assert len(list(again)) == len(whole[1])  # a whole epoch again
    again.load_state_dict(state)
    for a, b in zip(epoch(again, 0), whole[0], strict=True):
        same(a, b)
    with pytest.raises(CheckpointError, match="found batch_size 4; expected batch_size 5"):
        opened.loader("train", 5, shuffle=True, **of(kind)).load_state_dict(state)


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
def test_auto_says_why(path, tokenizer, monkeypatch):
    opened = open_dataset(path, DataConfig(), tokenizer)
    chosen = opened.loader("valid", 2)
    assert (chosen.kind, chosen.why.partition(" MB of frames fit into")[1]) == ("resident", " MB of frames fit into")
    monkeypatch.setattr(choice, "free_memory", lambda _: 100)
    chosen = opened.loader("valid", 2)
    assert chosen.kind == "torch"
    assert "do not fit into 50% of the 0 MB free on cpu, and without a GPU it is faster than dali" in chosen.why
    gpu = torch.device("cuda")
    monkeypatch.setattr(choice, "has_dali", lambda: False)
    kind, why = choice.choose("auto", 1000, gpu)
    assert kind == "torch" and "do not fit into 50% of the 0 MB free on cuda, and DALI is not installed" in why
    with pytest.raises(ConfigError, match=r"dali, which is not installed.*engine\[dali\]"):
        opened.loader("valid", 2, kind="dali")
    monkeypatch.setattr(choice, "has_dali", lambda: True)
    monkeypatch.setattr(choice.sys, "platform", "linux")
    assert choice.choose("auto", 1000, gpu)[0] == "dali"
    monkeypatch.setattr(choice, "free_memory", lambda _: None)
    assert choice.choose("auto", 1000, torch.device("cpu")) == ("resident", "0 MB of frames")


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
def test_text_on_the_device_does_not_count_as_frames(path, tokenizer):
    split = open_dataset(path, DataConfig(), tokenizer).splits["train"]
    size = split.frame_bytes
    split.source("text", torch.device("cpu"))
    assert split.frame_bytes == size > 0
    split.source("audio", torch.device("cpu"))
    assert split.frame_bytes == 0


def test_free_memory_is_a_positive_number():
    assert choice.free_memory(torch.device("cpu")) > 0


def test_float16_refuses_what_it_cannot_hold(tmp_path, tokenizer):
    data = writers.samples()
    data["valid"][1].audio[0, 0] = 1e6
    path = writers.dump(writers.mmsa(data), tmp_path / "x.pkl")
    config = DataConfig(precision="float16", normalize_audio="none")
    opened = open_dataset(path, config, tokenizer)
    for kind in ("resident", "torch"):
        with pytest.raises(DataError, match="range of float16"):
            list(opened.loader("valid", 3, kind=kind, workers=1))


# -- the sampler -----------------------------------------------------------------------------------


def lengths(count, seed=0):
    values = np.random.default_rng(seed).integers(4, 500, (count, 1)).repeat(2, 1)
    return Lengths(values, np.array([74, 35]))


def test_waste_is_the_share_of_padding():
    """Rows of 10 and 1 numbers; batches (0, 2) and (1), whose padded sizes are 2 * (2 * 10 + 5 * 1) and 3 * 10 + 4."""
    data = Lengths(np.array([[1, 5], [3, 4], [2, 3]]), np.array([10, 1]))
    assert data.waste(np.array([0, 2, 1]), 2) == pytest.approx(1 - (15 + 34 + 23) / (50 + 34), abs=1e-12)


def test_without_options_the_order_is_the_shuffled_one():
    rows = torch.cat(Sampler(50, 8, shuffle=True, seed=3).batches(2))
    assert torch.equal(rows, epoch_order(50, True, 3, 2))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 500])
@pytest.mark.parametrize("max_padding", [None, 0.3, 0.05, 0.0001])
def test_every_sample_once(count, max_padding):
    sampler = Sampler(count, 16, True, 5, max_padding=max_padding, lengths=lengths(count))
    for number in range(3):
        batches = sampler.batches(number)
        assert sorted(torch.cat(batches).tolist()) == list(range(count))
        assert sorted(map(len, batches))[1:] == [16] * (len(batches) - 1)


def test_padding_is_bounded_and_no_more_sorted_than_needed():
    data = lengths(1000)

    def waste(bound):
        batches = Sampler(1000, 20, True, 1, max_padding=bound, lengths=data).batches(0)
        return data.waste(torch.cat(batches).numpy(), 20), batches

    free, _ = waste(0.9)
    assert free == pytest.approx(data.waste(epoch_order(1000, True, 1, 0).numpy(), 20), abs=1e-3)
    assert free > 0.3
    found = [waste(bound)[0] for bound in (0.3, 0.1, 0.02)]
    assert all(w <= bound + 1e-9 for w, bound in zip(found, (0.3, 0.1, 0.02), strict=True))
    assert found[0] > 0.1 and found[1] > 0.02  # the windows were as short as they could be, within a doubling
    # batches of like length do not come one after another, and another epoch has others
    means = np.array([data.values[b.numpy(), 0].mean() for b in waste(0.02)[1]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5
    other = Sampler(1000, 20, True, 1, max_padding=0.1, lengths=data)
    assert [b.tolist() for b in other.batches(0)] != [b.tolist() for b in other.batches(1)]
    assert [b.tolist() for b in other.batches(0)] == [b.tolist() for b in other.batches(0)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [7, 40, 41, 43])
@pytest.mark.parametrize("max_padding", [None, 0.1])
def test_shards_cover_the_set_in_equal_steps(world, count, max_padding):
    ranks = [
        Sampler(count, 4, True, 1, shard=(r, world), max_padding=max_padding, lengths=lengths(count)).batches(3)
        for r in range(world)
    ]
    assert sorted(torch.cat([b for batches in ranks for b in batches]).tolist()) == list(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(b) <= 4 for batches in ranks for b in batches)
    dropped = [Sampler(count, 4, True, 1, True, shard=(r, world)).batches(3) for r in range(world)]
    assert {len(batches) for batches in dropped} == {count // (4 * world)}
    single = [Sampler(count, 4, True, 1, drop_singleton=True, shard=(r, world)).batches(3) for r in range(world)]
    assert len({len(batches) for batches in single}) == 1
    assert all(len(b) > 1 for batches in single for b in batches)
    # of one sample each, 7 samples cannot fill the same number of steps
    ones = [len(Sampler(7, 1, shard=(r, world)).batches(0)) for r in range(world)]
    assert sum(ones) == 7 and max(ones) - min(ones) == (7 % world > 0)


@pytest.mark.filterwarnings("ignore::engine.loaders.DataWarning")
def test_torchruns_environment(monkeypatch, path, tokenizer):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert torchrun_shard() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torchrun_shard() == (1, 2)
    opened = open_dataset(path, DataConfig(), tokenizer)
    assert [b.index.tolist() for b in opened.loader("valid", 1, shard="torchrun")] == [[1]]
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK=2 and WORLD_SIZE=2; expected numbers with RANK < WORLD_SIZE"):
        torchrun_shard()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"split": "dev"}, r"^split: found 'dev'; expected one of train, valid, test"),
        ({"task": "classes"}, r"^task: found 'classes'; expected one of regression, classification"),
        ({"kind": "numpy"}, r"^kind: found 'numpy'; expected one of auto, resident, dali, torch"),
        ({"batch_size": 0}, r"^batch_size: found 0; expected 1 or more"),
        ({"batch_size": 2.5}, r"^batch_size: found 2\.5; expected an integer"),
        ({"seed": "a"}, r"^seed: found 'a'; expected an integer"),
        ({"shard": (2, 2)}, r"^shard: found rank 2 of 2; expected a rank from 0 to the last\. Count ranks from 0"),
        ({"shard": (-1, 2)}, r"^shard: found rank -1 of 2"),
        ({"workers": -1}, r"^workers: found -1; expected 0 or more processes"),
        ({"workers": 1.0}, r"^workers: found 1\.0; expected 0 or more processes"),
        ({"workers": True}, r"^workers: found True; expected 0 or more processes"),
    ],
)
def test_wrong_arguments_are_named(path, wrong, found):
    """A rank beyond the last would train on rows that others have, too."""
    opened = open_dataset(path, DataConfig(modalities=["audio", "vision"]))
    arguments = {"split": "train", "batch_size": 4} | wrong
    with pytest.raises(ConfigError, match=found):
        opened.loader(**arguments)


def test_workers_may_be_a_numpy_integer(path):
    opened = open_dataset(path, DataConfig(modalities=["audio", "vision"]))
    assert len(list(opened.loader("test", 4, kind="torch", workers=np.int64(0)))) == 1


@pytest.mark.parametrize("state", [None, {}, {"epoch": 0}, [1]])
def test_what_is_no_position_is_refused(path, state):
    loader = open_dataset(path, DataConfig(modalities=["audio", "vision"])).loader("train", 4)
    with pytest.raises(CheckpointError, match="without sampler, epoch and batch; expected what state_dict gave"):
        loader.load_state_dict(state)
