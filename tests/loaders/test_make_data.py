"""`engine make-data`: every layout at every shape is read back as what was generated."""

import numpy as np
import pytest

from engine.cli import main
from engine.errors import ConfigError, OutputError
from engine.loaders.convert import convert
from engine.loaders.formats import read
from engine.loaders.make_data import COUNTS, make_data, samples
from engine.loaders.make_data.writers import WRITERS
from engine.loaders.store import open_store
from tests.loaders.test_text import small_tokenizer


@pytest.mark.parametrize("format", WRITERS)
def test_every_layout(tmp_path, format):
    shape = "avec2019" if format == "avec2019" else "mosi"
    path = make_data(tmp_path / "data", shape, 12, format)
    raw = read(path, "recorded")[1]
    assert raw.format == format.partition("-")[0].replace("misa", "tuples")
    assert [len(s.ids) for s in raw.splits.values()] == ([8, 2, 2] if shape == "avec2019" else [7, 1, 4])
    want = samples(shape, [len(s.ids) for s in raw.splits.values()])
    for split, rows in want.items():
        got = raw.splits[split]
        assert sorted(got.text) == sorted(s.text for s in rows)
        assert np.array_equal(np.sort(got.label[:, 0]), np.sort(np.array([s.label for s in rows], np.float32)))
        assert (got.audio.ragged.dim, got.vision.ragged.dim) == ((39, 49) if shape == "avec2019" else (5, 20))
        if format in ("declarelab", "mmsa", "tuples", "manifest"):
            assert all(np.array_equal(got.audio.ragged[i], s.audio) for i, s in enumerate(rows))


@pytest.mark.parametrize("format", WRITERS)
def test_every_layout_goes_through_the_store(tmp_path, format):
    path = make_data(tmp_path / "data", "avec2019" if format == "avec2019" else "mosei", 9, format)
    raw = read(path, "recorded")[1]
    stored = open_store(convert(path, tmp_path / "store", str(small_tokenizer(tmp_path / "encoder"))))
    assert stored.meta["format"] == raw.format
    for split, want in raw.splits.items():
        got = stored.splits[split]
        assert (got.ids, got.text) == (want.ids, want.text)
        assert np.array_equal(got.label, want.label)
        for part in ("audio", "vision"):
            assert np.array_equal(getattr(got, part).values, getattr(want, part).ragged.values)
            assert np.array_equal(getattr(got, part).offsets, getattr(want, part).ragged.offsets)


@pytest.mark.parametrize("shape", COUNTS)
def test_equal_seeds_give_equal_files(tmp_path, shape):
    a, b, c = (
        make_data(tmp_path / n, shape, 9, "mmsa", seed).read_bytes() for n, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a == b != c


def test_large_arrays_are_built_in_files(tmp_path, monkeypatch):
    from engine.loaders.make_data import writers

    whole = make_data(tmp_path / "a", "mosi", 9).read_bytes()
    monkeypatch.setattr(writers, "LARGE", 100)
    assert make_data(tmp_path / "b", "mosi", 9).read_bytes() == whole
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["MOSI-label.csv", "mosi_data_noalign.pkl"]


def test_what_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="new or empty"):
        make_data(tmp_path, "mosi", 9)
    with pytest.raises(ConfigError, match="--n"):
        make_data(tmp_path / "y", "mosi", 2)
    with pytest.raises(ConfigError, match="one of declarelab"):
        make_data(tmp_path / "y", "mosi", 9, "csv")
    with pytest.raises(ConfigError, match="shape avec2019"):
        make_data(tmp_path / "y", "mosi", 9, "avec2019")


def test_command(tmp_path, capsys):
    assert main(["make-data", str(tmp_path / "d"), "--shape", "avec2019", "--n", "9"]) == 0
    assert f"engine inspect {tmp_path / 'd'}" in capsys.readouterr().out
    encoder = str(small_tokenizer(tmp_path / "encoder"))
    command = ["convert", str(tmp_path / "d"), str(tmp_path / "store"), "--text-encoder", encoder]
    assert main([*command, "--format", "avec2019", "--audio-features", "ege", "--vision-features", "resnet"]) == 0
    train = open_store(tmp_path / "store").splits["train"]
    assert (train.audio.dim, train.vision.dim) == (23, 2048)
    assert main([*command, "--format", "tuples"]) == 2
    assert "found a list of AVEC2019 interviews" in capsys.readouterr().err
